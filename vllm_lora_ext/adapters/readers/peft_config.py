"""What PEFT's `adapter_config.json` says about one LoRA: ranks and scales, and what we refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.errors import AdapterError

MAX_ALPHA = 65536.0
MAX_RANK = 1 << 16
MAX_PATTERNS = 4096

# Written by PEFT for training only: they do not change what the saved tensors compute.
HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "alpha_pattern",
    "rank_pattern", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "init_lora_weights",
})  # fmt: skip
# Each of these changes what the layer computes. Any value but null, false or empty is refused.
REFUSED = {
    "use_dora": "DoRA (magnitude vectors)",
    "alora_invocation_tokens": "Activated LoRA",
    "lora_bias": "a bias on B",
    "layer_replication": "layer replication",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}
# These subtract something from the base weight, so the tensors alone do not make the adapter.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftLora:
    """Ranks and scales of a PEFT LoRA.

    Args:
        r, alpha: the defaults.
        ranks, alphas: (pattern over module names, value), the first match counts.
        rslora: scale is alpha / sqrt(r) instead of alpha / r.
        where: the file, for messages.
    """

    r: int
    alpha: float
    ranks: list[tuple[re.Pattern[str], int]]
    alphas: list[tuple[re.Pattern[str], float]]
    rslora: bool
    base_model: str
    where: str

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.r))

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = float(_by_pattern(self.alphas, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(
    config: dict[str, Any], where: str = "adapter_config.json", also: Collection[str] = ()
) -> PeftLora:
    """Check a PEFT config and take out what serving needs.

    Args:
        also: keys beyond PEFT's own that the caller reads itself.
    Raises:
        AdapterError: `missing_key`, `bad_value`, `unknown_key`, `unsupported_feature`.
    """
    _refuse_features(config, where, also)
    # PEFT writes every field; one gone from such a file was lost, and its default would be a guess.
    needed = ["r", "lora_alpha"]
    if config.get("peft_version"):
        needed += ["rank_pattern", "alpha_pattern", "use_rslora"]
    for key in needed:
        if key not in config:
            raise AdapterError(
                "missing_key", f"{where} has no '{key}'", fix="save the adapter again with PEFT"
            )
    ranks = {
        key: whole_number(value, f"rank_pattern['{key}'] in {where}", 1, MAX_RANK)
        for key, value in _table(config, "rank_pattern", where).items()
    }
    alphas = {
        key: _alpha(value, f"alpha_pattern['{key}'] in {where}")
        for key, value in _table(config, "alpha_pattern", where).items()
    }
    return PeftLora(
        r=whole_number(config["r"], f"r in {where}", 1, MAX_RANK),
        alpha=_alpha(config["lora_alpha"], f"lora_alpha in {where}"),
        ranks=_compile(ranks, f"rank_pattern in {where}"),
        alphas=_compile(alphas, f"alpha_pattern in {where}"),
        rslora=flag(config.get("use_rslora"), f"use_rslora in {where}"),
        base_model=base_model_of(config, where),
        where=where,
    )


def base_model_of(config: dict[str, Any], where: str) -> str:
    """`base_model_name_or_path` of a config, empty when it is null or absent."""
    name = config.get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise bad_value(f"base_model_name_or_path in {where}", name, "a text")
    return name


def whole_number(value: object, field: str, low: int, high: int) -> int:
    """`value` as an int within low..high. Raises AdapterError `bad_value`."""
    if type(value) is not int or not low <= value <= high:
        raise bad_value(field, value, f"a whole number from {low} to {high}")
    return value


def flag(value: object, field: str) -> bool:
    """`value` as a bool; null is false. Raises AdapterError `bad_value`."""
    if value is not None and not isinstance(value, bool):
        raise bad_value(field, value, "true or false")
    return bool(value)


def bad_value(field: str, seen: object, limit: str) -> AdapterError:
    """The error for a setting with a value that makes no sense."""
    return AdapterError(
        "bad_value", f"{field} is out of range", seen=seen, limit=limit, fix="mend the value"
    )


def _alpha(value: object, field: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # The comparison is false for NaN, and safe for integers that no float can hold.
    if not number or not -MAX_ALPHA <= value <= MAX_ALPHA:  # type: ignore[operator]
        raise bad_value(field, value, f"a number up to {MAX_ALPHA:g}")
    return float(value)  # type: ignore[arg-type]


def _table(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise bad_value(f"{key} in {where}", table, "an object")
    return table


def _refuse_features(config: dict[str, Any], where: str, also: Collection[str]) -> None:
    for key, value in config.items():
        if key in HARMLESS or key in also or value in (None, False, "", [], {}):
            continue
        if key in REFUSED or (key == "bias" and value != "none"):
            raise AdapterError(
                "unsupported_feature",
                f"'{key}' in {where}: {REFUSED.get(key, 'trained biases')} cannot be served",
                seen=value, limit="none" if key == "bias" else "null or false",
                fix="train without it, or merge it into the base model",
            )  # fmt: skip
        if key != "bias":
            raise AdapterError(
                "unknown_key", f"{where} holds '{key}', which ordinary LoRA does not have",
                seen=value, fix="if it matters for training only, remove it from the file",
            )  # fmt: skip
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        raise AdapterError(
            "unsupported_feature",
            f"init_lora_weights in {where} changed the base weights when training began",
            seen=init, limit=f"anything but {', '.join(CHANGED_BASE)}",
            fix="save it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip


def _compile(table: dict[str, Any], field: str) -> list[tuple[re.Pattern[str], Any]]:
    """PEFT's patterns: each must match the whole module name, or a tail of it after a dot.

    They come from an untrusted file, and Python's regex engine can be made to run for years:
    a few repetitions of single characters are allowed, repeated groups are not.
    """
    if len(table) > MAX_PATTERNS:
        raise bad_value(field, f"{len(table)} patterns", f"up to {MAX_PATTERNS}")
    found = []
    for pattern, value in table.items():
        repeats = _REPEAT.findall(pattern)
        risky = len(repeats) > 2 or any(r.startswith(")") for r in repeats) or "\\\\" in pattern
        if risky or len(pattern) > 300:
            limit = "300 characters, two of * + ? {, none of them after a group, no \\\\"
            raise bad_value(f"a pattern of {field}", pattern, limit)
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, RecursionError, OverflowError) as error:
            raise bad_value(f"a pattern of {field}", pattern, f"a regex ({error})") from error
    return found


def _by_pattern(patterns: list[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


_REPEAT = re.compile(r"(?<!\\)[^(\\]?[*+?{]|\\.[*+?{]")
