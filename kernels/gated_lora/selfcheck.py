"""Are the Triton kernels right on this device? A few small random cases against the reference.

Run once when an engine starts, with the engine's own rank and dtype, so that most of what is
compiled for it is used later. The cases are drawn on the CPU from a fixed seed: every machine
checks the same numbers, and none of their gates hangs on rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.reference import (
    TOLERANCE,
    SlotPart,
    gated_lora_reference,
)
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import StepMap
from vllm_lora_ext.routing import GateSpec, InputNorm, Rescale

TOKENS = (1, 33, 200, 600)  # one step for every row of the tuning table
SLICES, WIDTH = (192, 48), 512


@dataclass(frozen=True)
class Weights:
    """What one adapter does to one slice."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    gate: GateSpec
    router_GK: torch.Tensor | None = None
    bias_G: torch.Tensor | None = None
    head_K: torch.Tensor | None = None
    head_bias: float = 0.0
    logit_bias_G: torch.Tensor | None = None
    norm: InputNorm | None = None
    row_start: int = 0
    rescale: Rescale | None = None


def selfcheck(
    device: torch.device | str, dtype: torch.dtype, max_rank: int, max_router_rows: int
) -> str | None:
    """Runs plain, routed, rank-wise and base rows together in both launches.

    Returns:
        None when all is right, else what is wrong, in one line.
    """
    try:
        for case in cases(max_rank, max_router_rows):
            wrong = _run(case, device, dtype, max_rank, max_router_rows)
            if wrong is not None:
                return wrong
    except Exception as error:  # a compiler that fails, a launch that is refused: anything
        return in_one_line(error)
    return None


def in_one_line(error: Exception) -> str:
    """Its type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@dataclass(frozen=True)
class Case:
    """One step: x [T, WIDTH], the slot of every row, the adapters by slot and slice, those that
    share the slot after these, the numbers that come with the rows, and y before."""

    x_TK: torch.Tensor
    slots_T: np.ndarray
    slots: list[list[Weights | None]]
    mixed: list[SlotPart]
    rows_TC: np.ndarray
    y_TN: torch.Tensor


def cases(max_rank: int, max_router_rows: int) -> list[Case]:
    """The steps that are checked. A plain adapter, a router, rank-wise experts, an empty slot, and
    a slot with two adapters."""
    g = torch.Generator("cpu").manual_seed(20)
    experts = min(4, max_rank, max_router_rows)
    router = GateSpec(
        source="router", blocks=(max_rank // experts,) * experts, score="softmax",
        select="top_k", k=min(2, experts), weight="renormalise",
    )  # fmt: skip
    ranks = min(max_rank, 24)
    rank_wise = GateSpec(
        source="self", blocks=(1,) * ranks, select="top_k", key="abs", k=min(4, ranks), weight="one"
    )
    specs = (GateSpec(), router, rank_wise)
    slots: list[list[Weights | None]] = [
        [part_of(g, n, spec, max_rank) for n in SLICES] for spec in specs
    ]
    slots[2][0] = None
    slots[0][1] = replace(cast(Weights, slots[0][1]), rescale=_rescale(SLICES[1]))
    slots.append([None] * len(SLICES))
    made, mixed = [], _mixed(max_rank, max_router_rows)
    for t in TOKENS:
        slots_T = torch.randint(-1, len(slots), (t,), generator=g, device="cpu").numpy()
        slots_T[0] = 1  # a step of one row is routed
        x_TK = torch.randn(t, WIDTH, generator=g, device="cpu", dtype=torch.float32)
        if mixed:
            slots_T[(slots_T < 0) & (np.arange(t) % 2 == 1)] = len(slots)
        rows_TC = np.arange(3 * t, dtype=np.float32).reshape(t, 3) % 4 - 1
        ramp_N = torch.linspace(-2, 2, t * sum(SLICES), dtype=torch.float32, device="cpu")
        y_TN = ramp_N.sin().reshape(t, sum(SLICES))
        made.append(Case(x_TK, slots_T, slots, mixed, rows_TC, y_TN))
    return made


def _rescale(n: int) -> Rescale:
    ramp_N = torch.linspace(-1, 1, n, dtype=torch.float32, device="cpu")
    return Rescale.of(1 + ramp_N / 2, ramp_N.flip(0))


def _mixed(max_rank: int, max_router_rows: int) -> list[SlotPart]:
    """A router that reads a normalised x, its experts mixed apart, times a factor of each row; and
    two adapters that come and go with the rows."""
    if max_rank < 4 or max_router_rows < 2:
        return []
    g = torch.Generator("cpu").manual_seed(22)
    product = GateSpec(
        source="router", normalise="layer", blocks=(max_rank // 4,) * 2, score="softmax",
        product=True,
    )  # fmt: skip
    given = GateSpec(source="position", blocks=(1, 1))
    first, second = ([part_of(g, n, gate, 0) for n in SLICES] for gate in (product, given))
    return [SlotPart(first, 0.5, factor_at=0), SlotPart(second, row_start=1)]


def part_of(g: torch.Generator, n: int, gate: GateSpec, max_rank: int) -> Weights:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cpu", dtype=torch.float32)

    rank = sum(gate.blocks) or max_rank
    router_GK = normal(gate.num_gates, WIDTH) / WIDTH**0.5 if gate.source == "router" else None
    a_RK, b_NR = normal(rank, WIDTH) / WIDTH**0.5, normal(n, rank)
    norm = None
    if gate.normalise != "none" and router_GK is not None:
        norm = InputNorm.of(router_GK)
    return Weights(a_RK, b_NR, gate, router_GK, norm=norm)


def expected(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The reference's y for weights and inputs as the device holds them."""
    mixed = [
        replace(p, slices=[rounded(cast(Weights, s), dtype) for s in p.slices]) for p in case.mixed
    ]
    slots = [[p and rounded(p, dtype) for p in parts] for parts in case.slots]
    x_TK, slots_T = case.x_TK.to(dtype).float(), torch.from_numpy(case.slots_T)
    rows_TC, y_TN = torch.from_numpy(case.rows_TC), case.y_TN.to(dtype).float()
    return y_TN + gated_lora_reference(x_TK, slots_T, [*slots, mixed], SLICES, rows_TC, y_TN)


def rounded(p: Weights, dtype: torch.dtype) -> Weights:
    return replace(p, a_RK=p.a_RK.to(dtype).float(), b_NR=p.b_NR.to(dtype).float())


def _run(
    case: Case, device: torch.device | str, dtype: torch.dtype, max_rank: int, max_router_rows: int
) -> str | None:
    backend = choice.triton()
    slots = len(case.slots) + 1
    site = Site(slots, WIDTH, SLICES, max_rank, max_router_rows, dtype, device, backend)
    site.reserve_routers(site.most_routers)
    for buffer in (site.a_SRK, site.router_SGK, *site.bt_SRN):
        buffer.fill_(float("nan"))  # what no adapter wrote must not matter
    for slot, parts in enumerate(case.slots):
        site.write(slot, parts)
    packed = [(site.pack(p.slices), p.scale, p.factor_at, p.row_start) for p in case.mixed]
    site.load(slots - 1, site.compose(packed))
    site.step = StepMap(len(case.x_TK), device, tiled=True)
    site.step.update(case.slots_T)
    site.step.set_rows(case.rows_TC, [slice(0, len(case.rows_TC))])
    x_TK = case.x_TK.to(dtype).to(device)
    got = []
    for _ in range(2):
        y_TN = case.y_TN.to(device, dtype, copy=True)
        backend.gated_lora_(y_TN, x_TK, site)
        got.append(y_TN.cpu())
    return compare(got, expected(case, dtype), f"{dtype}, rank {max_rank}, {len(x_TK)} rows")


def compare(got: list[torch.Tensor], want_TN: torch.Tensor, where: str) -> str | None:
    """Two equal runs against what is expected."""
    error = float((got[0].float() - want_TN).norm() / want_TN.norm())
    if not error < TOLERANCE[got[0].dtype]:  # NaN is wrong too
        return f"results differ by {error:.1e} of their norm ({where})"
    if not torch.equal(got[0], got[1]):
        return f"two equal runs differ ({where})"
    return None
