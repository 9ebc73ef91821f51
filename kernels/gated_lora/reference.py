"""The op's specification: one slot, one slice at a time, in fp32.

`TOLERANCE` is how far a backend may be from it, by dtype of weights and activations: the norm of
the difference over the norm of what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_lora_ext.routing import GatedSlice, delta_reference

# fp32: tensor cores cut off what a CPU rounds, in each of up to 1,500 additions. fp16, bf16: both
# factors of the second product and the sum are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class SlotPart:
    """One of several adapters in a slot, and what multiplies it.

    Args:
        slices: what it does to each slice of the output.
        scale: for all rows.
        factor_at: column of the rows' own numbers with a factor for each row; -1: none.
        row_start: first column of those that its gates read.
    """

    slices: Sequence[GatedSlice | None]
    scale: float = 1.0
    factor_at: int = -1
    row_start: int = 0


def gated_lora_reference(
    x_TK: torch.Tensor,
    slots_T: torch.Tensor,
    slots: Sequence[Sequence[GatedSlice | None] | Sequence[SlotPart]],
    slice_sizes: Sequence[int],
    rows_TC: torch.Tensor | None = None,
    y_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the adapters add to a layer's output.

    Args:
        x_TK: [T, K] input of the layer.
        slots_T: [T] slot of each row, -1 for the base model.
        slots: for each slot, what its adapter does to each slice of the output; or its adapters.
        slice_sizes: N of each slice.
        rows_TC: [T, C] the numbers that come with each row, where something reads them.
        y_TN: [T, sum(N)] the layer's own output, where an adapter rescales it.
    Returns:
        [T, sum(N)] fp32.
    """
    x_TK = x_TK.float()
    delta_TN = x_TK.new_zeros(len(x_TK), sum(slice_sizes))
    for slot, content in enumerate(slots):
        at_T = torch.nonzero(slots_T == slot).flatten()
        own_TC = None if rows_TC is None else rows_TC[at_T]
        for part in _parts(content) if len(at_T) else ():
            at = 0
            for s, size in zip(part.slices, slice_sizes, strict=True):
                if s is not None:
                    delta_TN[at_T, at : at + size] += _part(part, s, x_TK[at_T], own_TC)
                if s is not None and s.rescale is not None:
                    assert y_TN is not None and part.scale == 1.0 and part.factor_at < 0
                    own_TN = y_TN[at_T, at : at + size].float()
                    rescaled_TN = s.rescale.scale_N * own_TN + s.rescale.shift_N
                    delta_TN[at_T, at : at + size] += rescaled_TN - own_TN
                at += size
    return delta_TN


def _parts(content: Sequence[GatedSlice | None] | Sequence[SlotPart]) -> list[SlotPart]:
    parts = [part for part in content if isinstance(part, SlotPart)]
    return parts or [SlotPart([s for s in content if not isinstance(s, SlotPart)])]


def _part(
    part: SlotPart, s: GatedSlice, x_TK: torch.Tensor, rows_TC: torch.Tensor | None
) -> torch.Tensor:
    if rows_TC is None:
        return part.scale * delta_reference(s, x_TK)
    start = part.row_start + s.row_start
    own_TG = rows_TC[:, start : start + s.gate.columns]
    delta_TN = part.scale * delta_reference(s, x_TK, own_TG)
    return delta_TN if part.factor_at < 0 else delta_TN * rows_TC[:, part.factor_at, None]
