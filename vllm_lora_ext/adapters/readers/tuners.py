"""What PEFT's tuners beside LoRA have in common: their config, and sizes their files leave out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.readers.peft_config import (
    MAX_RANK,
    PeftLora,
    bad_value,
    base_model_of,
    check_keys,
    read_peft_config,
    whole_number,
)
from vllm_lora_ext.errors import AdapterError

CONFIG = "adapter_config.json"
SIZES = "in and out of the adapted layers: {layer's name or its last word: [in, out]}"
# Written for training, or for finding the layers: they do not change what the tensors compute.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "module_dropout",
    "peft_type", "peft_version", "rank_dropout", "rank_dropout_scale", "revision",
    "runtime_config", "target_modules", "task_type", "use_effective_conv2d",
})  # fmt: skip
_REFUSED = {
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on bare parameters",
}


def read_tuner_config(folder: AdapterFolder, own: Collection[str]) -> str:
    """Refuse what a tuner's config holds beyond its own keys; then the base model's name.

    Args:
        own: keys that the caller reads, or knows to matter for training only.
    Raises:
        AdapterError: `unsupported_feature`, `unknown_key`, `bad_value`.
    """
    check_keys(folder.config, CONFIG, _HARMLESS, _REFUSED, own, folder.accepted)
    return base_model_of(folder.config, CONFIG)


def lycoris_scales(config: dict[str, Any]) -> PeftLora:
    """Ranks and scales of LoHa and LoKr: LoRA's, with the key `alpha`. Raises AdapterError."""
    given = {"lora_alpha": require(config, "alpha"), "use_rslora": False}
    known = ("r", "rank_pattern", "alpha_pattern", "peft_version")
    return read_peft_config(given | {key: config[key] for key in known if key in config})


def require(config: dict[str, Any], key: str) -> Any:
    """A key that the config must have. Raises AdapterError `missing_key`."""
    if key not in config:
        raise AdapterError("missing_key", f"{CONFIG} has no '{key}'", fix="save the adapter again")
    return config[key]


def whole(config: dict[str, Any], key: str, low: int = 1, high: int = MAX_RANK) -> int:
    """A whole number of the config. Raises AdapterError `missing_key`, `bad_value`."""
    return whole_number(require(config, key), f"{key} in {CONFIG}", low, high)


def number(config: dict[str, Any], key: str, bound: float = 65536.0) -> float:
    """A number of the config. Raises AdapterError `missing_key`, `bad_value`."""
    value = require(config, key)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not -bound <= value <= bound:
        raise bad_value(f"{key} in {CONFIG}", value, f"a number up to {bound:g}")
    return float(value)


def layer_sizes(folder: AdapterFolder, module: str) -> tuple[int, int]:
    """(in, out) of a layer, from the setting `sizes`.

    Raises:
        AdapterError: `missing_setting`, `bad_value`.
    """
    table = folder.setting("sizes", SIZES)
    if not isinstance(table, dict):
        raise bad_value("sizes", table, "an object: layer → [in, out]")
    found = table.get(module, table.get(module.rsplit(".", 1)[-1]))
    if found is None:
        raise AdapterError(
            "missing_setting", f"'sizes' says nothing about {module}", seen=sorted(table)[:4],
            limit=SIZES, fix="add it",
        )  # fmt: skip
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        raise bad_value(f"sizes of {module}", found, "[in, out]")
    return (
        whole_number(found[0], f"in of {module}", 1, 1 << 24),
        whole_number(found[1], f"out of {module}", 1, 1 << 24),
    )


def take_shaped(folder: AdapterFolder, name: str, *shape: int | None) -> torch.Tensor:
    """A tensor as float32, if its shape is this one; None stands for any size.

    Raises:
        AdapterError: `bad_shape`, and those of `AdapterFolder.take`.
    """
    check_shape(name, folder.shape(name), *shape)
    return folder.take(name)


def check_shape(name: str, seen: tuple[int, ...], *shape: int | None) -> None:
    """Raises AdapterError `bad_shape` unless `seen` is this shape; None stands for any size."""
    fits = len(seen) == len(shape) and all(
        want in (None, size) for size, want in zip(seen, shape, strict=True)
    )
    if not fits or 0 in seen:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise bad_shape(name, seen, f"[{wanted}], none of them 0")


def bad_shape(name: str, seen: tuple[int, ...], wanted: str) -> AdapterError:
    """The error for a tensor whose shape the format does not allow."""
    return AdapterError(
        "bad_shape", f"tensor '{name}' has the wrong shape", seen=list(seen), limit=wanted,
        fix="save the adapter again",
    )  # fmt: skip


def identity_factors(delta_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with `B A` equal to a dense delta, the smaller side an identity."""
    out, width = delta_NK.shape
    if width <= out:
        return torch.eye(width), delta_NK
    return delta_NK, torch.eye(out)
