"""From an adapter's name of a layer to the one that it has in vLLM's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models import supports_multimodal


class Names:
    """Of one model.

    Args:
        model: the model.
        known: whether a name of vLLM's is one of a layer that an adapter can name, here or on
            another rank.
        pooling: whether the model is served for pooling; adapters may then have been trained on
            the bare model, whose layers' names lack `model.`.
    """

    def __init__(self, model: Any, known: Callable[[str], bool], pooling: bool) -> None:
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper = mapper and mapper.get_rename_mapper()
        self._parts = _language_parts(model)
        self._known, self._pooling = known, pooling
        self._found: dict[str, str] = {}

    def layer(self, name: str) -> str:
        """vLLM's name of a layer; one that the model does not have stays what it is.

        Besides vLLM's own renaming: transformers 5 spells Mixtral's blocks `mlp`; and an adapter of
        a multimodal model may have its language model's names alone, as that has them by itself.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def parameter(self, name: str) -> str:
        """The same of a parameter, which is named behind its layer."""
        layer, _, parameter = name.rpartition(".")
        return f"{self.layer(layer)}.{parameter}"

    def _find(self, name: str) -> str:
        full = f"base_model.model.{name}.lora_A.weight"
        renamed = parse_fine_tuned_lora_name(full, self._mapper)[0]
        exact = next(filter(self._known, self._spellings(renamed)), None)
        if exact is not None:
            return exact
        own = [s for spelling in self._spellings(name) for s in _without_model(spelling)]
        inside = {s for part in self._parts for s in (f"{part}.{o}" for o in own) if self._known(s)}
        return inside.pop() if len(inside) == 1 else renamed

    def _spellings(self, name: str) -> list[str]:
        spellings = [name, name.replace(".mlp.", ".block_sparse_moe.")]
        if self._pooling:
            spellings += [f"model.{spelling}" for spelling in spellings]
        return spellings


def _without_model(name: str) -> tuple[str, str]:
    """Also what the name is where a model's language part is what others call `model`."""
    return name, name.removeprefix("model.")


def _language_parts(model: Any) -> tuple[str, ...]:
    if not supports_multimodal(model) or not hasattr(model, "get_mm_mapping"):
        return ()
    return tuple(part.rstrip(".") for part in model.get_mm_mapping().language_model)
