"""What the GPU kernel reads about the experts of each slot at one MLP block.

The gate stands in `SlotTables` of one slice, as that of a linear layer does; beside it, per slot,

    HEADER        column of u where the gate's and the up's A x begin (-1: no experts there),
                  whether the second linear has experts, the activation
    max_rank ints for the first rank of an expert: the first rank of the next one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton.tables import SlotTables
from vllm_lora_ext.kernels.gated_lora.codes import ACTIVATIONS
from vllm_lora_ext.kernels.gated_lora.plan import Shape, SlicePlan
from vllm_lora_ext.kernels.mix_mlp.backends.base import Tables

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.mix_mlp.block import BlockSite

HEADER = ("first_at", "up_at", "down", "activation", "factor_at", "scale")
SCALED = HEADER.index("factor_at")


class BlockTables(Tables):
    """Device tables of one block, at addresses that never change.

    Attributes:
        gate: [slots, ...] the gate over ranks; no ranks mean that the slot has no experts here.
        ints_SI: [slots, len(HEADER) + max_rank] int32.
    """

    def __init__(self, num_slots: int, max_rank: int, device: torch.device | str) -> None:
        self.gate = SlotTables(num_slots, (1,), max_rank, device, gates=1)
        size = len(HEADER) + max_rank
        self.ints_SI = torch.zeros(num_slots, size, dtype=torch.int32, device=device)

    def serves(self, act: str | None) -> bool:
        return act in ACTIVATIONS

    def shapes(self) -> list[Shape]:
        return [((self.ints_SI.shape[1],), self.ints_SI.dtype), *self.gate.shapes()]

    def clear(self, slot: int) -> None:
        self.gate.clear(slot)

    def describe(
        self, first: Sequence[SlicePlan], down: bool, act: str, rows: Sequence[torch.Tensor]
    ) -> None:
        ints, *gate_rows = rows
        gate = first[0].gate
        at = [p.a_start if p.a_stop > p.a_start else -1 for p in first]
        # One part over both gate and up: they share its A.
        header = [at[0], at[-1], int(down), ACTIVATIONS.index(act), *_factor(1.0, -1)]
        next_R = [0] * (self.ints_SI.shape[1] - len(HEADER))
        for start, stop in pairwise(accumulate(gate.blocks, initial=0)):
            next_R[start] = stop
        ints.copy_(torch.tensor(header + next_R, dtype=torch.int32))
        ranks = torch.empty(sum(gate.blocks), 0, dtype=torch.float32, device="cpu")
        self.gate.describe(0, 0, [(0, replace(first[0], bt_RN=ranks))], *gate_rows)

    def scaled_shapes(self) -> list[Shape]:
        return self.shapes()[:1]

    def scaled(
        self,
        rows: Sequence[torch.Tensor],
        scale: float,
        factor_at: int,
        out: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        (ints,) = out
        ints.copy_(rows[0])
        ints[SCALED : len(HEADER)] = torch.tensor(_factor(scale, factor_at), dtype=torch.int32)
        return ints, *rows[1:]

    def load(self, slot: int, rows: Sequence[torch.Tensor]) -> None:
        ints, *gate_rows = rows
        self.ints_SI[slot].copy_(ints, non_blocking=True)
        self.gate.load(slot, *gate_rows)


def _factor(scale: float, factor_at: int) -> list[int]:
    """The header's last two: a column, and the bits of a float32."""
    return [factor_at, int(np.float32(scale).view(np.int32))]


def tables_of(block: BlockSite) -> BlockTables:
    """A block's, on this backend."""
    assert isinstance(block.tables, BlockTables)
    return block.tables
