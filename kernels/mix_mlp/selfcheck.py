"""Is the blocks' kernel right on this device? One small block against the reference, as
`gated_lora.selfcheck` does for the linears' kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import silu

from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE
from vllm_lora_ext.kernels.gated_lora.selfcheck import Weights, in_one_line
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import StepMap
from vllm_lora_ext.kernels.mix_mlp.backends.base import Scratch
from vllm_lora_ext.kernels.mix_mlp.block import BlockSite, scratch_for
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.routing.mix import mix_reference

TOKENS, HIDDEN, INNER = 37, 256, 192


@dataclass(frozen=True)
class Case:
    """A base MLP, what its rows' experts do, x [TOKENS, HIDDEN], and the slot of every row."""

    gate_up_NK: torch.Tensor
    down_NK: torch.Tensor
    gate: GateSpec
    router_GK: torch.Tensor
    parts: dict[str, Weights]
    x_TK: torch.Tensor
    slots_T: np.ndarray


def selfcheck(
    device: torch.device | str, dtype: torch.dtype, max_rank: int, max_router_rows: int
) -> str | None:
    """Runs rows with experts between rows of a plain slot and of the base model.

    Returns:
        None when all is right, else what is wrong, in one line.
    """
    try:
        made = case(max_rank, max_router_rows, dtype)
        return _run(made, device, dtype, max_rank, max_router_rows)
    except Exception as error:  # a compiler that fails, a launch that is refused: anything
        return in_one_line(error)


def case(max_rank: int, max_router_rows: int, dtype: torch.dtype) -> Case:
    """Drawn on the CPU from a fixed seed; weights and x as `dtype` holds them, in fp32."""
    g = torch.Generator("cpu").manual_seed(21)

    def normal(n: int, k: int, scale: float = 1.0) -> torch.Tensor:
        w = torch.randn(n, k, generator=g, device="cpu", dtype=torch.float32) * scale / k**0.5
        return w.to(dtype).float()

    experts = min(4, max_rank, max_router_rows)
    gate = GateSpec(
        source="router", blocks=(max_rank // experts,) * experts, score="softmax",
        select="top_k", k=min(2, experts), weight="renormalise",
    )  # fmt: skip
    rank = sum(gate.blocks)
    shapes = {
        "gate_proj": (HIDDEN, INNER),
        "up_proj": (HIDDEN, INNER),
        "down_proj": (INNER, HIDDEN),
    }
    parts = {
        name: Weights(normal(rank, k), normal(n, rank), gate) for name, (k, n) in shapes.items()
    }
    x_TK = normal(TOKENS, HIDDEN, HIDDEN**0.5)
    return Case(
        normal(2 * INNER, HIDDEN), normal(HIDDEN, INNER), gate, normal(experts, HIDDEN, 3.0), parts,
        x_TK, np.arange(TOKENS) % 3 - 1,
    )  # fmt: skip


def expected(case: Case) -> torch.Tensor:
    """The reference's answer: slot 1 has the experts, the others nothing."""
    gate_NK, up_NK = case.gate_up_NK.chunk(2)
    linears = {
        "gate_proj": lambda h: h @ gate_NK.t(),
        "up_proj": lambda h: h @ up_NK.t(),
        "down_proj": lambda h: h @ case.down_NK.t(),
    }
    act = silu(linears["gate_proj"](case.x_TK)) * linears["up_proj"](case.x_TK)
    want_TN = linears["down_proj"](act)
    rows_T = torch.from_numpy(case.slots_T) == 1
    want_TN[rows_T] = mix_reference(case, case.x_TK[rows_T], linears, silu)
    return want_TN


def _run(
    case: Case, device: torch.device | str, dtype: torch.dtype, max_rank: int, max_router_rows: int
) -> str | None:
    block = _block(case, device, dtype, max_rank, max_router_rows)
    scratch = scratch_for([block], TOKENS, dtype)
    assert scratch is not None
    for memory in scratch:  # what no launch wrote must not matter
        memory.fill_(float("nan"))
    got_TN = _forward(case, block, scratch, device, dtype)
    want_TN = expected(case)
    error = float((got_TN.float().cpu() - want_TN).norm() / want_TN.norm())
    if not error < 2 * TOLERANCE[dtype]:  # NaN is wrong too; two products in a row are rounded
        where = f"{dtype}, rank {max_rank}"
        return f"results of an MLP block differ by {error:.1e} of their norm ({where})"
    return None


def _block(
    case: Case, device: torch.device | str, dtype: torch.dtype, max_rank: int, max_router_rows: int
) -> BlockSite:
    options = max_rank, max_router_rows, dtype, device, choice.triton()
    first = Site(2, HIDDEN, (INNER, INNER), *options)
    last = Site(2, INNER, (HIDDEN,), *options)
    block = BlockSite(first, last, silu, act_name="silu")
    gate, up, down = (case.parts[name] for name in ("gate_proj", "up_proj", "down_proj"))
    plain = GateSpec()
    routed = Weights(gate.a_RK, gate.b_NR, case.gate, case.router_GK)
    up, down = (Weights(p.a_RK, p.b_NR, plain) for p in (up, down))
    block.write(1, case.gate, [routed, up], down)
    first.step = last.step = StepMap(TOKENS, device, tiled=True)
    first.step.update(case.slots_T)
    return block


def _forward(
    case: Case, block: BlockSite, scratch: Scratch, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """The three steps as a server's layers run them."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton.expand import expand_
    from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import shrink

    x_TK, gate_up_NK, down_NK = (
        w.to(device, dtype) for w in (case.x_TK, case.gate_up_NK, case.down_NK)
    )
    gate_up_TN = x_TK @ gate_up_NK.t()
    u_PTR = shrink(x_TK, block.first, memory=scratch.u)
    expand_(gate_up_TN, u_PTR, block.first)
    gate_TI, up_TI = gate_up_TN.chunk(2, dim=1)
    a_TI = silu(gate_TI) * up_TI
    block.backend.mix_(a_TI, scratch.z, gate_up_TN, scratch.u, block)
    y_TN = a_TI @ down_NK.t()
    expand_(y_TN, shrink(a_TI, block.last, memory=scratch.z), block.last)
    return y_TN
