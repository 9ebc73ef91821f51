"""The attention layers of a served model, for who keeps more in the KV cache beside theirs."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from vllm_lora_ext.errors import AdapterError


def own_attentions(model: nn.Module, setting: str, windows: bool) -> list[Attention]:
    """Of the model itself, not of a drafter that stands beside it in vLLM's table.

    Args:
        setting: which needs them, for the error; windows: whether they may be sliding windows.
    Raises:
        AdapterError: `bad_settings`, one keeps something else than keys and values of its own.
    """
    kept: dict[str, Any] = {
        name: layer for name, layer in model.named_modules()
        if isinstance(layer, AttentionLayerBase)
    }  # fmt: skip
    other = [
        f"{name}: {type(layer).__name__}" for name, layer in kept.items()
        if type(layer) is not Attention
        or layer.attn_type != AttentionType.DECODER
        or layer.kv_sharing_target_layer_name is not None
        or (layer.sliding_window is not None and not windows)
    ]  # fmt: skip
    if other or not kept:
        raise not_served(
            setting, "keeps something else than keys and values of its own in each attention layer",
            other[:1], "decoders whose layers all have a KV cache of their own"
            + ("" if windows else ", of all tokens"),
        )  # fmt: skip
    return list(kept.values())


def not_served(setting: str, why: str, seen: object, limit: str) -> AdapterError:
    """The error for a model that a setting does not go with."""
    return AdapterError(
        "bad_settings", f"the setting {setting} is given, and this model {why}",
        seen=seen or "none", limit=limit, fix=f"leave the setting {setting} out",
    )  # fmt: skip
