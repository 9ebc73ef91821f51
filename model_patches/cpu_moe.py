"""Mixture-of-experts base models start on a CPU with LoRA on.

Targets: `select_unquantized_moe_backend`, which picks Triton as soon as LoRA is on, whatever the
platform, so that the first request of any kind dies; and the wrappers of fused experts in
`vllm.lora.utils._all_lora_classes`, whose kernels are Triton's too. On a CPU the experts run as
they do without LoRA and take none; attention, router gates and all other linears do.
"""

from __future__ import annotations

import functools
from typing import Any

import vllm.lora.utils as lora_utils
import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as moe_method
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.platforms import current_platform


def apply() -> None:
    """Nothing but on a CPU."""
    if not current_platform.is_cpu():
        return
    stock = moe_method.select_unquantized_moe_backend

    @functools.wraps(stock)
    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        moe_config.is_lora_enabled = False
        return stock(moe_config)

    moe_method.select_unquantized_moe_backend = select_unquantized_moe_backend
    fused = (FusedMoEWithLoRA, FusedMoE3DWithLoRA)
    lora_utils._all_lora_classes = tuple(
        cls for cls in lora_utils._all_lora_classes if not issubclass(cls, fused)
    )
