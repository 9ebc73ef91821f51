"""The op's specification: one slot, one slice at a time, in fp32.

`TOLERANCE` is how far a backend may be from it, by dtype of weights and activations: the norm of
the difference over the norm of what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lora_ext.routing import GatedSlice, delta_reference

# fp32: tensor cores cut off what a CPU rounds, in each of up to 1,500 additions. fp16, bf16: both
# factors of the second product and the sum are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


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
    delta_TN = x_TK.new_zeros(len(x_TK), sum(slice_sizes))
    for slot, slices in enumerate(slots):
        rows_T = torch.nonzero(slots_T == slot).flatten()
        at = 0
        for s, size in zip(slices, slice_sizes, strict=True):
            if s is not None and len(rows_T):
                delta_TN[rows_T, at : at + size] = delta_reference(s, x_TK[rows_T])
            at += size
    return delta_TN
