"""What each tool's method reads of a case's parameters: the one table, and the check against it."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_lora_ext.errors import AdapterError

# What cases write down beside a tool's parameters: how the numbers were made, or the inputs anew.
NOTES = frozenset({
    "adapters", "weights", "ids", "torch_manual_seed_before_call", "torch_manual_seed",
    "random_seed", "dare_seed", "draw_order", "flat_order", "elements", "kept_per_adapter", "stack",
    "singular_value_threshold", "adapter_order", "softmax_weights", "dtype",
})  # fmt: skip


class Tool(NamedTuple):
    """The parameters of a tool, each a text of names.

    Args:
        key: the parameter that names the method; None where there is one method only.
        reads: method → what it reads; `*` stands for every other method.
        needs: what each method must be given.
        accepts: what the tool's own call takes whatever the method, and ignores where it is not
            read: a signature, or the fields of a request, with their defaults.
    """

    key: str | None
    reads: dict[str, str]
    needs: str = ""
    accepts: str = ""


_CORE = "merge_method merge_space scaling_coeff isotropize"
_KNOTS = "merge_method merging_type scaling_coeffs dare dare_pruning_coeffs concat_across_output"
MERGEKIT = "weight density normalize rescale lambda int8_mask"  # of all but the plain average
TOOLS = {
    "PEFT": Tool(
        "combination_type", {"*": ""},
        accepts="density majority_sign_method svd_rank svd_clamp svd_full_matrices svd_driver",
    ),
    "mergekit": Tool(
        "merge_method",
        {
            "linear": "weight normalize", "della": f"{MERGEKIT} epsilon",
            "della_linear": f"{MERGEKIT} epsilon", "breadcrumbs": f"{MERGEKIT} gamma",
            "breadcrumbs_ties": f"{MERGEKIT} gamma", "*": MERGEKIT,
        },
        # One block of global parameters stays while the method is exchanged.
        accepts="models parameters normalize rescale lambda int8_mask",
    ),
    "LoRAX": Tool("merge_strategy", {"*": ""}, accepts="density majority_sign_method"),
    "LoraHub": Tool(None, {"*": ""}),
    "Core Space": Tool(
        "merge_method",
        {
            "tv": _CORE, "sum": _CORE, "mean": _CORE, "iso": _CORE, "tsv": _CORE,
            "ties": f"{_CORE} topK", "dare": f"{_CORE} dare_pruning_coeffs",
            "dare-ties": f"{_CORE} topK dare_pruning_coeffs",
            "dare_ties": f"{_CORE} topK dare_pruning_coeffs",
            "cart": f"{_CORE} cart_pruning_rank cart_scaling_coeffs",
        },
        needs="merge_space scaling_coeff",
    ),
    "KnOTS": Tool(
        "merge_method",
        {"tv": _KNOTS, "ties": f"{_KNOTS} sign_resolve_mode"},
        needs="scaling_coeffs", accepts="topK topK_percent",
    ),
    "TIES-Merging": Tool(
        None, {"*": "reset_type reset_thresh_percent resolve_method merge_func scaling_lambda"},
        needs="reset_thresh_percent merge_func scaling_lambda",
    ),
    "DARE": Tool(
        None, {"*": "mask_rate use_rescale mask_strategy scaling_coefficient"},
        needs="mask_rate use_rescale scaling_coefficient",
    ),
    "RobustMerge": Tool(None, {"*": "mask_ratio att_ratio fuse_weight"}),
    "LoRA-Soups": Tool(None, {"*": "lora_mix_mode"}, needs="lora_mix_mode"),
}  # fmt: skip

# Conversions and generations: what is read, and what the case writes down of how it was made.
_TUNER = "r lora_alpha alpha use_rslora use_dora rank_pattern alpha_pattern init_weights"
VARIANTS = {
    "dora": _TUNER,
    "ia3": _TUNER,
    "icm_decode": "latent_dim condition_dim input_length adjusted_input_length kernel_size"
    " divide_slice_length use_rslora lora_alpha r",
    "loram_recover": "lora_recover_type recovered index full_shapes head_dim num_heads"
    " num_key_value_heads",
    "extract_svd": "max_rank sv_epsilon distribute_scale modules result_config",
    "nola_expand": "num_basis r lora_alpha generator basis_check",
    "dps_stage": "stage lora_alpha lora_scale_init scale_range alpha0 curriculum_stage_num gate"
    " gates r",
    "rebase_": f"init converted {_TUNER}",
}
NEEDED = {"extract_svd": "max_rank", "icm_decode": "condition_dim input_length"}


def check_merge(case: dict[str, Any]) -> None:
    """Of a merge. Raises AdapterError `unknown_key`, `missing_key`, `bad_value`."""
    system, given = case["system"], case["parameters"]
    tool = TOOLS[system]
    method, where = None, system
    needed = tool.needs
    if tool.key is not None and system != "PEFT":
        _check(system, given, set(given), tool.key)
        method, needed = given[tool.key], f"{tool.key} {tool.needs}"
        where = f"{system} {method}"
    reads = tool.reads.get(str(method), tool.reads.get("*"))
    if reads is None:
        raise AdapterError(
            "bad_value", f"{system} has no method {method}", seen=method, limit=sorted(tool.reads),
            fix="choose one of them",
        )  # fmt: skip
    known = {*reads.split(), *tool.accepts.split(), *(tool.key or "").split()}
    if system == "mergekit":
        inner = {key for model in given.get("models", []) for key in model} - {"name"}
        nested = inner | set(given.get("parameters", {}))
        _check(where, dict.fromkeys(nested), known - {"models", "parameters", "merge_method"}, "")
    _check(where, given, known | NOTES, needed)


def check_variant(case: dict[str, Any]) -> None:
    """Of a conversion or generation. Raises AdapterError `unknown_key`, `missing_key`."""
    method, system = case["method"], case["system"]
    row = "rebase_" if method.startswith("rebase_") else method
    names = VARIANTS.get(row)
    if names is None and system.startswith("PEFT tuner "):
        names = _fields(system.removeprefix("PEFT tuner "))
    if names is None:
        names = {"LoRAFactory": "", "LLM-Pruner": ""}.get(system.split(" ")[0], "") + _TUNER
    _check(f"{system} {method}", case["parameters"], set(names.split()), NEEDED.get(row, ""))


def _fields(tuner: str) -> str | None:
    """A PEFT tuner's parameters are its config's."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING  # slow, and the merges do not need it

    found = {kind.value.lower(): row for kind, row in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config = found.get(tuner.split(" ")[0].lower())
    return None if config is None else " ".join(config.__dataclass_fields__)


def _check(where: str, given: dict[str, Any], known: set[str], needed: str) -> None:
    for key in sorted(set(given) - known):
        raise AdapterError(
            "unknown_key", f"{where} has no parameter {key}", seen=given[key],
            limit=sorted(known - NOTES), fix=f"remove '{key}'",
        )  # fmt: skip
    for key in needed.split():
        if given.get(key) is None:
            raise AdapterError(
                "missing_key", f"{where} needs the parameter {key}", limit=needed.split(),
                fix=f"give '{key}'",
            )  # fmt: skip
