"""Bases of int8 weights (compressed-tensors W8A8) start on a CPU with LoRA on.

Target: `_get_lora_device`, which asks a layer's weight where it lies. oneDNN keeps a packed copy of
its own, and the layer's weight is None from then on; its scale is still there.
"""

from __future__ import annotations

import functools

import torch
import vllm.lora.layers.base_linear as base_linear


def apply() -> None:
    """Asks any parameter where there is no weight."""
    stock = base_linear._get_lora_device

    @functools.wraps(stock)
    def _get_lora_device(base_layer: torch.nn.Module) -> torch.device:
        if getattr(base_layer, "weight", base_layer) is None:
            return next(base_layer.parameters()).device
        device: torch.device = stock(base_layer)
        return device

    base_linear._get_lora_device = _get_lora_device
