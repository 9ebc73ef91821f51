"""One adapter's experts at one MLP block: as its slot has them, and packed in host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, SlotPlan
from vllm_lora_ext.routing import GateSpec

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BlockPlan:
    """One adapter at one block.

    Args:
        gate: how the experts are weighted; its blocks are their ranks.
        first: where the first linear's parts stand; its slices are gate (with the router) and up.
        last: the same of the second linear's one part, or None when it has no experts.
        act: the activation over [gate | up], as the model's own.
        sums_to_one: the weights always do, so that a bias of the second linear is not scaled.
        scale, factor_at: as in `PackedBlock`.
    """

    gate: GateSpec
    first: SlotPlan
    last: SlotPlan | None
    act: Activation
    sums_to_one: bool
    scale: float
    factor_at: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last rank of every expert."""
        return list(pairwise(accumulate(self.gate.blocks, initial=0)))


@dataclass(frozen=True)
class PackedBlock:
    """One adapter's experts at one block in host memory, as its slot will hold them.

    Args:
        gate, act, sums_to_one: as in `BlockPlan`.
        first, last: of the two linears.
        tables: the slot's rows of `BlockTables`; empty without them.
        on_kernels: whether the Triton kernels serve it.
        scale: multiplies what the experts change; factor_at: so does this column of
            `StepMap.rows_TC` (-1: none).
    """

    gate: GateSpec
    first: PackedSite
    last: PackedSite | None
    act: Activation
    sums_to_one: bool
    tables: tuple[torch.Tensor, ...]
    on_kernels: bool
    scale: float = 1.0
    factor_at: int = -1


def sums_to_one(gate: GateSpec) -> bool:
    """Whether the experts' weights always do."""
    return gate.weight in ("renormalise", "softmax") and gate.constant == 1.0
