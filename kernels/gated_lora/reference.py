"""The op's specification: one slot, one slice at a time, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lora_ext.routing import GatedSlice, delta_reference


def gated_lora_reference(
    x_TK: torch.Tensor,
    slots_T: torch.Tensor,
    slots: Sequence[Sequence[GatedSlice | None]],
    slice_sizes: Sequence[int],
) -> torch.Tensor:
    """What the adapters add to a layer's output.

    Args:
        x_TK: [T, K] input of the layer.
        slots_T: [T] slot of each row, -1 for the base model.
        slots: for each slot, what its adapter does to each slice of the output.
        slice_sizes: N of each slice.
    Returns:
        [T, sum(N)] fp32.
    """
    x_TK = x_TK.float()
    delta_TN = torch.zeros(len(x_TK), sum(slice_sizes), device=x_TK.device)
    for slot, slices in enumerate(slots):
        rows_T = torch.nonzero(slots_T == slot).flatten()
        at = 0
        for s, size in zip(slices, slice_sizes, strict=True):
            if s is not None and len(rows_T):
                delta_TN[rows_T, at : at + size] = delta_reference(s, x_TK[rows_T])
            at += size
    return delta_TN
