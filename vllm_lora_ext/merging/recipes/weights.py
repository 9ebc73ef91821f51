"""A recipe's weights and own parameters, as `merge` takes them."""

from __future__ import annotations

from typing import Any

from vllm_lora_ext.merging.parameters import OF_ADAPTERS
from vllm_lora_ext.merging.recipes.schema import Filtered, Own, OwnOfModel


def plain(weight: Any) -> Any:
    """A recipe's weight as `ops.scale.resolve` takes it."""
    if isinstance(weight, list) and weight and isinstance(weight[0], Filtered):
        return [
            {"value": entry.value} | ({"filter": entry.filter} if entry.filter else {})
            for entry in weight
        ]
    return weight


def own_of(own: Own | OwnOfModel) -> dict[str, Any]:
    """A term's own parameters."""
    return {key: value for key in OF_ADAPTERS if (value := getattr(own, key)) is not None}
