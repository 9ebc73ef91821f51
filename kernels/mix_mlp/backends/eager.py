"""A block in PyTorch, on any device: a loop over slots and experts. It has no launch of its own
between the linears; `BlockSite` calls `mix`.

On a CPU an expert computes the rows that chose it. A GPU would have to say how many these are, and
the host to wait for that: there each expert computes all rows of its slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.plan import SlicePlan
from vllm_lora_ext.kernels.gated_lora.step import Group
from vllm_lora_ext.kernels.mix_mlp.backends.base import Tables
from vllm_lora_ext.kernels.mix_mlp.plan import BlockPlan
from vllm_lora_ext.routing.mix import expert_weights

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site
    from vllm_lora_ext.kernels.mix_mlp.block import BlockSite


def make_tables(first: Site) -> Tables:
    return Tables()


def scratch(blocks: Sequence[BlockSite], max_tokens: int, dtype: torch.dtype) -> None:
    return None


def mix_(
    a_TI: torch.Tensor,
    z: torch.Tensor,
    gate_up_TN: torch.Tensor,
    u: torch.Tensor,
    block: BlockSite,
) -> None:
    """Nothing."""


def warm(blocks: Iterable[BlockSite], max_tokens: int, dtype: torch.dtype) -> None:
    """Nothing is compiled."""


def mix(
    plan: BlockPlan, base_TN: torch.Tensor, u_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixed activations [T, inner], the weighted A_d a_e of every rank, the sum of weights."""
    slices = plan.first.slices
    at = slices[0].router_start
    v_TE = expert_weights(plan.gate, u_TR[:, at : at + plan.gate.num_gates])
    chosen_TE = v_TE != 0
    z_TR = u_TR.new_zeros(len(u_TR), sum(plan.gate.blocks))
    mixed: torch.Tensor | None = None
    for e, (start, stop) in enumerate(plan.spans):
        rows_T = _rows_of_expert(chosen_TE[:, e])
        if not len(rows_T):
            continue
        v_T1 = v_TE[rows_T, e, None]
        a_TI = plan.act(_expert_input(slices, base_TN[rows_T], u_TR[rows_T], start, stop))
        if plan.last is not None:
            a_d_RI = plan.last.a_RK[start:stop].float()
            z_TR[rows_T, start:stop] = _weighted(torch.mm(a_TI, a_d_RI.t()), v_T1)
        if mixed is None:
            mixed = base_TN.new_zeros(len(u_TR), a_TI.shape[1])
        mixed.index_add_(0, rows_T, _weighted(a_TI, v_T1))
    if mixed is None:  # no expert at all: the block's output is zero, as the formula has it
        mixed = torch.zeros_like(plan.act(base_TN))
    return mixed, z_TR, v_TE.sum(dim=1)


def _counts(x: torch.Tensor) -> bool:
    """Whether the host knows at once what is in a tensor."""
    return x.is_cpu


def _rows_of_expert(chosen_T: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that an expert computes."""
    if _counts(chosen_T):
        return torch.nonzero(chosen_T).flatten()
    return torch.arange(len(chosen_T), device=chosen_T.device)


def _weighted(x_TN: torch.Tensor, v_T1: torch.Tensor) -> torch.Tensor:
    """v x, and 0 of rows that did not choose the expert, whatever it has made of them."""
    vx_TN = v_T1 * x_TN
    return vx_TN if _counts(x_TN) else vx_TN.masked_fill_(v_T1 == 0, 0.0)


def _expert_input(
    slices: tuple[SlicePlan, ...], base_TN: torch.Tensor, u_TR: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """gate(x) and up(x) of one expert, side by side."""
    parts, at = [], 0
    for p in slices:
        width = p.y_stop - p.y_start
        part = base_TN[:, at : at + width]
        if p.a_stop > p.a_start:
            h_TR = u_TR[:, p.a_start + start : p.a_start + stop]
            part = torch.addmm(part, h_TR, p.bt_RN[start:stop].float())
        parts.append(part)
        at += width
    return torch.cat(parts, dim=1)


def rows_of(x: torch.Tensor, group: Group) -> torch.Tensor:
    if group.index_T is None:
        return x[group.start : group.stop]
    return x.index_select(0, group.index_T)


def add_rows_(y_TN: torch.Tensor, group: Group, add_TN: torch.Tensor) -> None:
    if group.index_T is None:
        y_TN[group.start : group.stop] += add_TN.to(y_TN.dtype)
    else:
        y_TN.index_add_(0, group.index_T, add_TN.to(y_TN.dtype))
