"""Where in an engine something may differ by token: layers whose rows are positions of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.lora.layers import BaseLayerWithLoRA

from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class Positions:
    """Of one engine.

    Args:
        text: the wrapper of the language model's layers; those of towers see other rows.
        unknown: why the host does not know which rows are whose, if it does not.
    """

    text: Any
    unknown: str | None

    def check(self, name: str, layer: BaseLayerWithLoRA) -> None:
        """Raises AdapterError `unsupported_feature` when nothing may differ by token at a layer.

        Args:
            name: of the layer, for messages.
        """
        if self.unknown is not None:
            raise AdapterError(
                "unsupported_feature", "what the adapter adds differs by token, and this engine"
                f" has {self.unknown}", seen=name,
                limit="an engine that knows on the host which rows are whose",
                fix="start without it",
            )  # fmt: skip
        if layer.punica_wrapper is not self.text:
            raise AdapterError(
                "unsupported_feature", "what an adapter adds differs by token where the layer's"
                " rows are not the positions of a request", seen=name,
                limit="layers of the language model",
                fix="use spans, modalities and Activated LoRA with adapters of these only",
            )  # fmt: skip
