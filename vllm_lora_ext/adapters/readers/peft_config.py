"""What PEFT's `adapter_config.json` says about one LoRA: ranks and scales, and what we refuse."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.adapters.readers.patterns import Patterns
from vllm_lora_ext.errors import AdapterError

MAX_ALPHA = 65536.0
MAX_RANK = 1 << 16

# Written for training, for finding the layers, or for merging: they do not change what the saved
# tensors compute. Every field of PEFT's LoraConfig is here, in REFUSED, or `bias`; docs/adapters.md
# says why.
HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
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
}
# Ways to begin that leave the base weights alone. PiSSA, OLoRA, CorDA and LoftQ subtract from them,
# so the tensors alone do not make the adapter; LoRA-GA does so while it trains, and not when PEFT
# reads what was saved.
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class PeftLora:
    """Ranks and scales of a PEFT LoRA.

    Args:
        r, alpha: the defaults.
        ranks, alphas: pattern over module names → value.
        rslora: scale is alpha / sqrt(r) instead of alpha / r.
        where: the file, for messages.
    """

    r: int
    alpha: float
    ranks: Patterns[int]
    alphas: Patterns[float]
    rslora: bool
    base_model: str
    where: str

    def rank(self, module: str) -> int:
        """Raises AdapterError `bad_value`, the patterns take too long."""
        found = self.ranks.find(module)
        return self.r if found is None else found

    def scale(self, module: str) -> float:
        """Raises AdapterError `bad_value`, the patterns take too long."""
        rank, alpha = self.rank(module), self.alphas.find(module)
        alpha = self.alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(
    config: dict[str, Any],
    where: str = "adapter_config.json",
    also: Collection[str] = (),
    accepted: Collection[str] = (),
) -> PeftLora:
    """Check a PEFT config and take out what serving needs.

    Args:
        also: keys beyond PEFT's own that the caller reads itself.
        accepted: keys that nobody knows and that are let through.
    Raises:
        AdapterError: `missing_key`, `bad_value`, `unknown_key`, `unsupported_feature`.
    """
    check_keys(config, where, HARMLESS, REFUSED, also, accepted)
    if "init_lora_weights" not in also:
        _check_init(config.get("init_lora_weights"), where)
    for key in ("r", "lora_alpha"):  # the others have PEFT's defaults
        if key not in config:
            raise AdapterError(
                "missing_key", f"{where} has no '{key}'", fix="save the adapter again with PEFT"
            )
    ranks = {
        key: _rank(value, f"rank_pattern['{key}'] in {where}")
        for key, value in _table(config, "rank_pattern", where).items()
    }
    alphas = {
        key: _alpha(value, f"alpha_pattern['{key}'] in {where}")
        for key, value in _table(config, "alpha_pattern", where).items()
    }
    return PeftLora(
        r=_rank(config["r"], f"r in {where}"),
        alpha=_alpha(config["lora_alpha"], f"lora_alpha in {where}"),
        ranks=Patterns(ranks, f"rank_pattern in {where}"),
        alphas=Patterns(alphas, f"alpha_pattern in {where}"),
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


def _rank(value: object, field: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return whole_number(value, field, 1, MAX_RANK)


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


def check_keys(
    config: Mapping[str, Any],
    where: str,
    harmless: Collection[str],
    refused: Mapping[str, str],
    also: Collection[str] = (),
    accepted: Collection[str] = (),
) -> None:
    """Refuse what would change the numbers, and what nobody knows.

    Args:
        harmless, also: keys with any value.
        refused: key → what it switches on.
        accepted: keys that are let through where nobody knows them.
    Raises:
        AdapterError: `unsupported_feature`, `unknown_key`.
    """
    for key, value in config.items():
        if key in harmless or key in also or value in (None, False, "", [], {}):
            continue
        if key in refused or (key == "bias" and value != "none"):
            raise AdapterError(
                "unsupported_feature",
                f"'{key}' in {where}: {refused.get(key, 'trained biases')} cannot be served",
                seen=value, limit="none" if key == "bias" else "null or false",
                fix="train without it, or merge it into the base model",
            )  # fmt: skip
        if key != "bias" and key not in accepted:
            raise AdapterError(
                "unknown_key", f"{where} holds '{key}', which this format does not have",
                seen=value, fix="if it matters for training only, remove it from the file, or start"
                f' the server with --additional-config \'{{"lora_ext": {{"accept_config_keys":'
                f' ["{key}"]}}}}\'',
            )  # fmt: skip


def refuse_lost_dora(config: Mapping[str, Any], where: str) -> None:
    """Refuses DoRA experts of MixLoRA's authors (MoE-PEFT, `mixlora`): both programs save A and B
    only. What they load has the norms of W + B A for magnitudes, so that each factor is one.

    Raises:
        AdapterError: `unsupported_feature`, `bad_value`.
    """
    if flag(config.get("use_dora"), f"use_dora in {where}"):
        raise AdapterError(
            "unsupported_feature", f"'use_dora' in {where}: the magnitudes that DoRA has trained"
            " are not among the saved tensors", seen=True, limit=False,
            fix='train without it; or set "use_dora": false, which is what the authors\' program'
            " computes from such a file: there the magnitudes cancel out",
        )  # fmt: skip


def _check_init(init: object, where: str) -> None:
    if isinstance(init, str) and init.lower() not in INITS:
        raise AdapterError(
            "unsupported_feature",
            f"init_lora_weights in {where} changed the base weights when training began",
            seen=init, limit=f"true, false or {', '.join(INITS)}",
            fix="save it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip
