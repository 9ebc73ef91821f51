"""The GPU backend: two launches for any batch, which read all that differs from tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton.expand import expand_
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import shrink
from vllm_lora_ext.kernels.gated_lora.backends.triton.store import TableStore as make_store
from vllm_lora_ext.kernels.gated_lora.backends.triton.warmup import warm

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

__all__ = ["expand_", "gated_lora_", "make_store", "on_device", "shrink", "warm"]

on_device = True


def gated_lora_(y_TN: torch.Tensor, x_TK: torch.Tensor, site: Site) -> None:
    expand_(y_TN, shrink(x_TK, site), site)
