"""The op's specification: one slot, one slice at a time, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lora_ext.kernels.gated_lora.site import GatedSlice
from vllm_lora_ext.routing import gate_reference


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
                delta_TN[rows_T, at : at + size] = gated_slice_reference(x_TK[rows_T], s)
            at += size
    return delta_TN


def gated_slice_reference(x_TK: torch.Tensor, s: GatedSlice) -> torch.Tensor:
    """`B (g(x) ⊙ (A x))` of one slice: [T, N] fp32."""
    ax_TR = x_TK @ s.a_RK.float().t()
    if s.gate.source == "none":
        return ax_TR @ s.b_NR.float().t()
    u_TG = ax_TR if s.router_GK is None else x_TK @ s.router_GK.float().t()
    head_T = None if s.head_K is None else x_TK @ s.head_K.float() + s.head_bias
    g_TR = gate_reference(s.gate, u_TG, s.bias_G, head_T)
    return (g_TR * ax_TR) @ s.b_NR.float().t()
