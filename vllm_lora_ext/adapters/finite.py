"""NaN and infinity: one of them in a slot would poison the KV cache of every request."""

from __future__ import annotations

import torch

from vllm_lora_ext.errors import AdapterError


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; makes no copy of it."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def not_finite(what: str, tensor: torch.Tensor) -> AdapterError:
    """The error for a tensor with NaN or infinity in it."""
    bad = int((~torch.isfinite(tensor)).sum())
    return AdapterError(
        "not_finite", f"{what} holds NaN or infinity", seen=f"{bad} of {tensor.numel()} values",
        limit="finite numbers", fix="train or save the adapter again",
    )  # fmt: skip
