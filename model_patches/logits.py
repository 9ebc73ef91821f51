"""The LoRA of the output matrix: every row whose logits are computed gets its own slot's.

Target: the name `LogitsProcessorWithLoRA` in `vllm.lora.utils`. Stock takes the rows for those to
sample from, one after the other, also where they are prompt rows or rows of drafts, and reads the
whole [V, R] in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
import vllm.lora.utils as lora_utils
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA

from vllm_lora_ext.kernels.gated_lora import Factors
from vllm_lora_ext.model_patches.rows import Rows, wrap_runners


class RoutedLogits(LogitsProcessorWithLoRA):
    """Stock's layer; which rows get which slot, and that unused weights are not read, is ours."""

    rows: Rows  # set by `follow_rows`, when the engine's manager is made

    def create_lora_weights(self, max_loras, lora_config, model_config=None) -> None:  # type: ignore[no-untyped-def]
        super().create_lora_weights(max_loras, lora_config, model_config)
        self.used: set[int] = set()
        self.factors = Factors(max_loras, lora_config.max_lora_rank, self.device)

    def set_mapping(self, punica_wrapper) -> None:  # type: ignore[no-untyped-def]
        super().set_mapping(SimpleNamespace(add_lora_logits=self.add_delta))
        self.step = punica_wrapper.step_map

    def reset_lora(self, index: int) -> None:
        if index in self.used:
            self.used.discard(index)
            self.factors.clear(index)
            super().reset_lora(index)

    def set_lora(self, index, lora_a, lora_b) -> None:  # type: ignore[no-untyped-def]
        super().set_lora(index, lora_a, lora_b)
        self.used.add(index)
        self.factors.clear(index)

    def forward(self, lm_head, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.used & self.step.slots:
            return super().forward(lm_head, *args, **kwargs)
        return self.base_layer.forward(getattr(lm_head, "base_layer", lm_head), *args, **kwargs)

    def add_delta(
        self,
        y_NV: torch.Tensor,
        x_NK: torch.Tensor,
        a_S1RK: torch.Tensor,
        b_S1VR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Adds B A x to each row's logits, in place: what stock's layer asks its wrapper for.

        Every slot of the step is one product over all rows, with zeros in those of other slots:
        the host need not know which they are. Where the logits are padded, y is wider than V.
        """
        rows_N = self.rows.logits_rows(x_NK)
        slots_N1 = self.step.token_slots_T[rows_N, None]
        x_NK, y_NV = x_NK.float(), y_NV[:, : b_S1VR.shape[2]]
        for slot in sorted(self.used & self.step.slots):
            h_NR = (x_NK @ a_S1RK[slot, 0].float().t()) * scale
            if slot in self.factors.slots:
                h_NR *= self.factors.of(slot, self.step.rows_TC[rows_N])
            h_NR = torch.where(slots_N1 == slot, h_NR, 0).to(y_NV.dtype)
            y_NV.addmm_(h_NR, b_S1VR[slot, 0].t().to(y_NV.dtype))
        return y_NV


def follow_rows(rows: Rows, layers: Mapping[str, BaseLayerWithLoRA]) -> None:
    """To be called when a manager has its layers: the output matrix learns of an engine's rows."""
    for layer in layers.values():
        if isinstance(layer, RoutedLogits):
            layer.rows = rows
            wrap_runners()


def apply() -> None:
    """vLLM's managers build the subclass."""
    lora_utils.LogitsProcessorWithLoRA = RoutedLogits
