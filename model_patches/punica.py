"""vLLM's per-step LoRA metadata, extended by a `StepMap`.

Target: the name `get_punica_wrapper` in `vllm.lora.model_manager`. The class that vLLM chooses for
the platform is subclassed; its own metadata, which on a GPU takes several waits of the host, is
computed only where a layer of stock's reads it (fused experts, classification heads).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
import vllm.lora.model_manager as model_manager
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches.backend import building
from vllm_lora_ext.model_patches.layers import RoutedEmbedding, RoutedLinear
from vllm_lora_ext.model_patches.logits import RoutedLogits


class StepMixin:
    """Fills a `StepMap` whenever vLLM maps the step's rows to slots."""

    def __init__(self, max_num_batched_tokens: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, *args, **kwargs)  # type: ignore[call-arg]
        tiled = building().backend.on_device
        self.step_map = StepMap(max_num_batched_tokens, self.device, tiled)  # type: ignore[attr-defined]
        self.stock_reads = True

    def update_metadata(self, mapping, lora_index_to_id, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if self.stock_reads:
            super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)  # type: ignore[misc]
        slot_of = {id_: slot for slot, id_ in enumerate(lora_index_to_id) if id_ is not None}
        ids, inverse_T = np.unique(np.asarray(mapping.index_mapping), return_inverse=True)
        slots = np.array([slot_of[int(i)] if i > 0 else -1 for i in ids], dtype=np.int64)
        self.step_map.update(slots[inverse_T] if len(ids) else slots)


class CpuHeadMixin:
    """LoRA on a classification head, where the index of rows without an adapter, -1, is the last
    slot's in stock's op."""

    def add_lora_logits(self, y, x, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        delta = torch.zeros_like(y)
        super().add_lora_logits(delta, x, *args, **kwargs)  # type: ignore[misc]
        y += torch.where(self.sampler_indices[:, None] >= 0, delta, 0)  # type: ignore[attr-defined]


@cache
def _with_step(stock: type) -> type:
    own = (StepMixin, CpuHeadMixin) if issubclass(stock, PunicaWrapperCPU) else (StepMixin,)
    return type(stock.__name__, (*own, stock), {"__module__": __name__})


def skip_unread(wrappers: Iterable[Any], layers: Iterable[BaseLayerWithLoRA]) -> None:
    """To be called when a manager has its layers: what none of stock's reads is not computed."""
    ours = RoutedLinear, RoutedEmbedding, RoutedLogits
    stock = [layer.punica_wrapper for layer in layers if not isinstance(layer, ours)]
    for wrapper in wrappers:
        wrapper.stock_reads = any(read is wrapper for read in stock)


def apply() -> None:
    """Makes vLLM's managers build the subclass of whatever wrapper the platform names."""

    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        from vllm.platforms import current_platform
        from vllm.utils.import_utils import resolve_obj_by_qualname

        stock = resolve_obj_by_qualname(current_platform.get_punica_wrapper())
        return _with_step(stock)(*args, **kwargs)

    model_manager.get_punica_wrapper = get_punica_wrapper
