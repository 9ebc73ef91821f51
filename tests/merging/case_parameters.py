"""What each tool's methods read of a case's parameters: one table, and the check against it.

A case may say what its tool reads for the case's method, what the tool's own call takes with every
method and passes over, and notes: how the numbers were made, or the inputs anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_lora_ext.errors import AdapterError

Case = dict[str, Any]

NOTES = {
    "adapters", "weights", "ids", "torch_manual_seed_before_call", "torch_manual_seed",
    "random_seed", "dare_seed", "draw_order", "flat_order", "elements", "kept_per_adapter", "stack",
    "singular_value_threshold", "adapter_order", "softmax_weights", "dtype",
}  # fmt: skip


class Tool(NamedTuple):
    """One tool.

    Args:
        methods: method → names that it reads; under None those of a case that names no method.
        key: the parameter that names the method; empty where a tool has one method, named None.
        every: names that all methods take, read or not.
        needs: names that must be there.
    """

    methods: Mapping[str | None, str]
    key: str = ""
    every: str = ""
    needs: str = ""


_SVD = "svd_rank svd_clamp svd_full_matrices svd_driver"
# `add_weighted_adapter` has all of these, whatever the combination type.
_PEFT = f"density majority_sign_method {_SVD}"
_FACTORS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_DENSE = tuple(f"{kind}_svd" for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune"))
_CORE = "isotropize"
_DROPS = "dare_pruning_coeffs"
_EMPTY: dict[str | None, str] = {None: ""}
TOOLS = {
    "PEFT": Tool(
        {None: "", **dict.fromkeys((*_FACTORS, *_DENSE), _PEFT)}, "combination_type"
    ),
    # int8_mask is how mergekit holds its masks; a file has the switches for all of its methods.
    "mergekit": Tool(
        {
            "linear": "weight normalize int8_mask",
            "task_arithmetic": "weight normalize rescale lambda int8_mask",
            **dict.fromkeys(
                ("ties", "dare_ties", "dare_linear"),
                "weight density normalize rescale lambda int8_mask",
            ),
            **dict.fromkeys(
                ("della", "della_linear"),
                "weight density epsilon normalize rescale lambda int8_mask",
            ),
            **dict.fromkeys(
                ("breadcrumbs", "breadcrumbs_ties"),
                "weight density gamma normalize rescale lambda int8_mask",
            ),
        },
        "merge_method", "models parameters", "merge_method",
    ),
    # A request has a density and a way of electing signs, with defaults, whatever its strategy.
    "LoRAX": Tool(
        dict.fromkeys(("linear", "ties", "dare_linear", "dare_ties"), ""),
        "merge_strategy", "density majority_sign_method", "merge_strategy",
    ),
    "LoraHub": Tool(_EMPTY),
    "Core Space": Tool(
        {
            **dict.fromkeys(("tv", "sum", "mean", "tsv"), _CORE), "iso": "",
            "ties": f"{_CORE} topK", "dare": f"{_CORE} {_DROPS}",
            **dict.fromkeys(("dare-ties", "dare_ties"), f"{_CORE} topK {_DROPS}"),
            "cart": f"{_CORE} cart_pruning_rank cart_scaling_coeffs",
        },
        "merge_method", "merge_space scaling_coeff", "merge_method merge_space scaling_coeff",
    ),
    "KnOTS": Tool(
        dict.fromkeys(
            ("ties", "tv"),
            f"merging_type topK topK_percent sign_resolve_mode dare {_DROPS} concat_across_output",
        ),
        "merge_method", "scaling_coeffs", "merge_method scaling_coeffs",
    ),
    "TIES-Merging": Tool(
        {None: "reset_type resolve_method"},
        every="reset_thresh_percent merge_func scaling_lambda",
        needs="reset_thresh_percent merge_func scaling_lambda",
    ),
    "DARE": Tool(
        {None: "mask_strategy"},
        every="mask_rate use_rescale scaling_coefficient",
        needs="mask_rate use_rescale scaling_coefficient",
    ),
    "RobustMerge": Tool({None: "mask_ratio att_ratio fuse_weight"}),
    "LoRA-Soups": Tool({"cat": "", "linear": ""}, "lora_mix_mode", "", "lora_mix_mode"),
}  # fmt: skip

_LORAM = "lora_recover_type recovered index full_shapes head_dim num_heads num_key_value_heads"
# Conversions of one artefact: what the reader takes, then what such a case repeats of it.
CONVERSIONS = {
    "dora": "", "ia3": "", "loram_recover": _LORAM,
    "extract_svd": "max_rank sv_epsilon modules distribute_scale result_config",
    "nola_expand": "basis_check num_basis generator",
    "dps_stage": "stage lora_alpha lora_scale_init scale_range"
    " curriculum_stage_num r gate alpha0 gates",
    "icm_decode": "condition_dim input_length latent_dim adjusted_input_length kernel_size"
    " divide_slice_length use_rslora lora_alpha r",
}  # fmt: skip
CONVERSION_NEEDS = {
    "extract_svd": ("max_rank",), "icm_decode": ("condition_dim", "input_length"),
}  # fmt: skip


def check_tool(case: Case) -> None:
    """Of a merge.

    Raises:
        AdapterError: `unknown_key`, `missing_key`; `bad_value`, the tool has no such method.
    """
    system, given = case["system"], case["parameters"]
    tool = TOOLS[system]
    _check_there(system, given, tool.needs.split())
    kind = given.get(tool.key) if tool.key else None
    if kind not in tool.methods:
        raise AdapterError(
            "bad_value", f"{system} has no such {tool.key} here", seen=kind,
            limit=[name for name in tool.methods if name],
        )  # fmt: skip
    reads, where = tool.methods[kind].split(), f"{system} {kind}" if kind else system
    _check_names(where, given, [tool.key, *tool.every.split(), *reads])
    if system == "mergekit":
        for model in given.get("models", []):
            _check_names(where, model, ["name", *reads])
        _check_names(where, given.get("parameters", {}), reads)
    if system == "KnOTS" and given.get("dare"):
        _check_there(where, given, [_DROPS])


def check_conversion(case: Case, config: Path | None) -> None:
    """Of a conversion, whose parameters may also repeat the artefact's own configuration.

    Args:
        config: the artefact's adapter_config.json, if it has one.
    Raises:
        AdapterError: `unknown_key`, `missing_key`; `setting_mismatch`, the configuration says
            something else.
    """
    method, given = case["method"], case["parameters"]
    repeats = json.loads(config.read_text()) if config and config.is_file() else {}
    known = CONVERSIONS.get(method, "").split()
    if method.startswith("rebase_"):
        known = ["init", "converted"]
    where = f"{case['system']} {method}"
    _check_names(where, given, [*known, *repeats])
    _check_there(where, given, CONVERSION_NEEDS.get(method, ()))
    for key in set(given) & set(repeats) - set(known):
        if given[key] != repeats[key]:
            raise AdapterError(
                "setting_mismatch", f"'{key}' of the case is not what its adapter's files say",
                seen=given[key], limit=repeats[key],
            )  # fmt: skip


def _check_names(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known and key not in NOTES:
            raise AdapterError(
                "unknown_key", f"{where} has no parameter '{key}'", seen=given[key],
                limit=sorted(filter(None, known)), fix=f"remove '{key}'",
            )  # fmt: skip


def _check_there(where: str, given: Mapping[str, Any], needs: Any) -> None:
    for key in needs:
        if given.get(key) is None:
            raise AdapterError(
                "missing_key", f"{where} needs the parameter '{key}'", limit=list(needs)
            )
