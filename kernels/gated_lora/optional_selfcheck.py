"""Are the kernels right on this device that only settings turn on? `selfcheck` asks that of the
others. A and routers below a base weight (`extension`), the launch that activates too, and the one
that fetches weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.extension import PARTS
from vllm_lora_ext.kernels.gated_lora.op import prefetch_in_order
from vllm_lora_ext.kernels.gated_lora.reference import gated_lora_reference
from vllm_lora_ext.kernels.gated_lora.selfcheck import (
    WIDTH,
    Weights,
    compare,
    in_one_line,
    part_of,
    rounded,
)
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import StepMap
from vllm_lora_ext.routing import GateSpec

TOKENS = (1, 33, 64)
SLICES = (96, 96)  # gate and up


@dataclass(frozen=True)
class _Layer:
    """A base layer's weight and a plain, a routed, and no adapter in its slots."""

    weight_NK: torch.Tensor
    slots: list[list[Weights | None]]


def selfcheck(
    device: torch.device | str,
    dtype: torch.dtype,
    max_rank: int,
    max_router_rows: int,
    extended: bool,
    activates: bool,
    prefetches: bool,
) -> str | None:
    """Runs plain, routed and base rows together.

    Args:
        extended, activates, prefetches: which kernels.
    Returns:
        None when all is right, else what is wrong, in one line.
    """
    kinds = [(e, a) for e, a in ((True, False), (False, True), (True, True))
             if e <= (extended and dtype in PARTS) and a <= activates]  # fmt: skip
    try:
        layer = _layer(dtype, max_rank, max_router_rows)
        for below, act in kinds:
            for t in TOKENS:
                limits = max_rank, max_router_rows
                wrong = _run(layer, t, device, dtype, limits, below, act)
                if wrong is not None:
                    return wrong
        if prefetches:
            _fetch(layer, device, dtype, max_rank, max_router_rows)
    except Exception as error:  # a compiler that fails, a product that is refused: anything
        return in_one_line(error)
    return None


def _layer(dtype: torch.dtype, max_rank: int, max_router_rows: int) -> _Layer:
    g = torch.Generator("cpu").manual_seed(23)
    weight_NK = torch.randn(sum(SLICES), WIDTH, generator=g, device="cpu", dtype=torch.float32)
    experts = min(4, max_rank, max_router_rows)
    router = GateSpec(
        source="router", blocks=(max_rank // experts,) * experts, score="softmax",
        select="top_k", k=min(2, experts), weight="renormalise",
    )  # fmt: skip
    slots: list[list[Weights | None]] = [
        [part_of(g, n, spec, max_rank) for n in SLICES] for spec in (GateSpec(), router)
    ]
    slots[1][1] = None
    return _Layer((weight_NK / WIDTH**0.5).to(dtype), [*slots, [None, None]])


def _fetch(
    layer: _Layer, device: torch.device | str, dtype: torch.dtype, max_rank: int, router_rows: int
) -> None:
    """Has no result: that it compiles and runs is all."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton.prefetch import prefetch

    limits = max_rank, router_rows, dtype, device, choice.triton()
    sites = [Site(len(layer.slots), WIDTH, SLICES, *limits) for _ in range(2)]
    step = StepMap(TOKENS[1], device, tiled=True)
    step.update(np.arange(TOKENS[1]) % 4 - 1)
    for site in sites:
        site.step = step
        for slot, parts in enumerate(layer.slots):
            site.write(slot, parts)
    prefetch_in_order(sites)
    for site in sites:
        prefetch(TOKENS[1], site)
    step.table.cpu()  # waits; a launch that fails says so here


def _run(
    layer: _Layer,
    t: int,
    device: torch.device | str,
    dtype: torch.dtype,
    limits: tuple[int, int],
    below: bool,
    act: bool,
) -> str | None:
    from vllm_lora_ext.kernels.gated_lora.backends.triton.extended import expand_extended
    from vllm_lora_ext.kernels.gated_lora.backends.triton.glu import glu

    g = torch.Generator("cpu").manual_seed(t)
    x_TK = torch.randn(t, WIDTH, generator=g, device="cpu", dtype=torch.float32).to(dtype)
    slots_T = (np.arange(t) + 1) % 4 - 1  # a step of one row has an adapter
    backend, weight_NK = choice.triton(), layer.weight_NK.to(device)
    site = Site(
        len(layer.slots), WIDTH, SLICES, *limits, dtype, device, backend,
        base_NK=weight_NK if below else None,
    )  # fmt: skip
    if site.extension is not None:
        site.extension.weight_EK.fill_(float("nan"))  # what no adapter wrote must not matter
        site.extension.follow(weight_NK)
    site.activation = "silu" if act else None
    for slot, parts in enumerate(layer.slots):
        site.write(slot, parts)
    site.step = StepMap(t, device, tiled=True)
    site.step.update(slots_T)
    got, x = [], x_TK.to(device)
    for _ in range(2):
        y_TN = x.new_empty(t, SLICES[0] if act else sum(SLICES))
        own_TN = torch.mm(x, weight_NK.t())
        if site.extension is not None:
            own_TN = site.extension.product(x)
        if act:
            glu(y_TN, own_TN, None if below else backend.shrink(x, site), site)
        else:
            expand_extended(y_TN, own_TN, None, site)
        got.append(y_TN.cpu())
    want_TN = x_TK.float() @ layer.weight_NK.float().t()
    slots = [[p and rounded(p, dtype) for p in parts] for parts in layer.slots]
    want_TN = want_TN + gated_lora_reference(x_TK, torch.from_numpy(slots_T), slots, SLICES)
    if act:
        gate_TN, up_TN = want_TN.chunk(2, dim=1)
        want_TN = torch.nn.functional.silu(gate_TN) * up_TN
    what = "A below the base weight" * below + ", " * (below and act) + "activated" * act
    return compare(got, want_TN, f"{dtype}, rank {limits[0]}, {t} rows, {what}")
