"""Gate values per expert, from a layer's input: what a trace holds."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_lora_ext.routing import GatedSlice, GateSpec, gate_reference, logits_reference


def expert_gates(
    spec: GateSpec,
    u_TG: torch.Tensor,
    bias_G: torch.Tensor | None = None,
    head_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, G] fp32: `routing.gate_reference` with one value per gate instead of one per rank."""
    return gate_reference(replace(spec, blocks=(1,) * spec.num_gates), u_TG, bias_G, head_T)


def slice_gates(
    s: GatedSlice, x_TK: torch.Tensor, rows_TG: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, G] fp32 gates of an adapter's layer for its inputs [T, in]; its gate has a source.

    Args:
        rows_TG: [T, G], as for `routing.logits_reference`.
    """
    head_T = None if s.head_K is None else x_TK.float() @ s.head_K.float() + s.head_bias
    return expert_gates(s.gate, logits_reference(s, x_TK, rows_TG), s.bias_G, head_T)
