"""What each tool's method reads of a case's parameters: the one table, and the check against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm_lora_ext.errors import AdapterError

# What cases write down beside a tool's parameters: how the numbers were made, or the inputs anew.
NOTES = frozenset({
    "adapters", "weights", "ids", "torch_manual_seed_before_call", "torch_manual_seed",
    "random_seed", "dare_seed", "draw_order", "flat_order", "elements", "kept_per_adapter", "stack",
    "singular_value_threshold", "adapter_order", "softmax_weights", "dtype",
})  # fmt: skip


class Value(NamedTuple):
    """What a parameter may be: the check, and the same in words or as a list."""

    fits: Callable[[Any], bool]
    allowed: object


def _one_of(*values: Any) -> Value:
    # 1 is not True here, and [] is not hashed.
    return Value(lambda value: any(type(value) is type(v) and value == v for v in values), values)


def _real(low: float, high: float, words: str, open_low: bool = False) -> Value:
    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (low < value if open_low else low <= value) and value <= high

    return Value(fits, words)


def _list_of(one: Value, words: str) -> Value:
    return Value(lambda value: isinstance(value, list) and all(map(one.fits, value)), words)


def _either(*values: Value) -> Value:
    return Value(lambda value: any(v.fits(value) for v in values), [v.allowed for v in values])


FLAG = _one_of(True, False)
NUMBER = _real(-1e6, 1e6, "a number")
SHARE = _real(0, 1, "above 0 up to 1", open_low=True)
PERCENT = _real(0, 100, "above 0 up to 100", open_low=True)
LOST = Value(lambda v: _real(0, 1, "").fits(v) and v != 1, "0 to below 1")  # what DARE drops
WHOLE = Value(lambda value: type(value) is int and 1 <= value <= 1 << 16, "a whole number from 1")
TEXT = Value(lambda value: isinstance(value, str), "a text")
OBJECT = Value(lambda value: isinstance(value, dict), "an object")


class Tool(NamedTuple):
    """The parameters of a tool, each a text of names.

    Args:
        key: the parameter that names the method; None where there is one method only.
        reads: method → what it reads; `*` stands for every other method.
        needs: what each method must be given.
        accepts: what the tool's own call takes whatever the method, and ignores where it is not
            read: a signature, or the fields of a request, with their defaults.
        values: what some of them may be; all others are a recipe's, which has its own checks. One
            that is here with a single value stands in the tool's configs, and is repeated at this
            value only. Null counts as not said.
    """

    key: str | None
    reads: dict[str, str]
    needs: str = ""
    accepts: str = ""
    values: dict[str, Value] = {}  # noqa: RUF012 of a tuple, never written


_CORE = "merge_method merge_space scaling_coeff isotropize"
_KNOTS = "merge_method merging_type scaling_coeffs dare dare_pruning_coeffs"
MERGEKIT = "weight density normalize rescale lambda int8_mask"  # of all but the plain average
TOOLS = {
    "PEFT": Tool(
        "combination_type", {"*": ""},
        accepts="density majority_sign_method svd_rank svd_clamp svd_full_matrices svd_driver",
        values={"combination_type": _one_of(
            "cat", "linear", "svd", "ties", "ties_svd", "dare_ties", "dare_ties_svd", "dare_linear",
            "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
        )},
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
        values={
            "merge_method": _one_of(
                "linear", "task_arithmetic", "ties", "dare_ties", "dare_linear", "della",
                "della_linear", "breadcrumbs", "breadcrumbs_ties",
            ),
            "models": _list_of(OBJECT, "a list of objects, one for each input"),
            "parameters": OBJECT,
        },
    ),
    "LoRAX": Tool(
        "merge_strategy", {"*": ""}, accepts="density majority_sign_method",
        values={"merge_strategy": _one_of("linear", "ties", "dare_linear", "dare_ties")},
    ),
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
        values={
            "merge_space": _one_of("core", "full", "knots"), "scaling_coeff": NUMBER,
            "isotropize": FLAG, "topK": PERCENT, "dare_pruning_coeffs": LOST,
            "cart_pruning_rank": SHARE, "cart_scaling_coeffs": NUMBER,
        },
    ),
    "KnOTS": Tool(
        "merge_method",
        {"tv": _KNOTS, "ties": _KNOTS},
        needs="scaling_coeffs",
        # Where its pieces are kept between two runs changes no number.
        accepts="topK topK_percent concat_across_output sign_resolve_mode representation"
        " merge_other_params s_on_V ptm_usage normalize_Vs_per_model ingredients_path",
        values={
            "scaling_coeffs": _either(NUMBER, Value(
                lambda v: v != [] and _list_of(NUMBER, "").fits(v), "a list of numbers")),
            "topK": PERCENT, "topK_percent": PERCENT, "dare": FLAG, "dare_pruning_coeffs": LOST,
            "merging_type": _one_of("mean", "sum"),  # its max forgets the sign
            # Pieces side by side; one below the other is another basis.
            "concat_across_output": _one_of(True),
            # sum_of_signs counts a tie as minus there, as nothing does here.
            "sign_resolve_mode": _one_of("sum_of_values"),
            # `vector` is TIES on whole matrices: TIES-Merging's case.
            "representation": _one_of("svd-vector"),
            "merge_other_params": _one_of(False),
            # Of its first configs; no code reads them any more.
            "s_on_V": _one_of(True), "ptm_usage": _one_of("None"),
            "normalize_Vs_per_model": _one_of(False),
        },
    ),
    "TIES-Merging": Tool(
        None, {"*": "reset_type reset_thresh_percent resolve_method merge_func scaling_lambda"},
        needs="reset_thresh_percent merge_func scaling_lambda",
        values={
            "reset_type": _one_of("topk"), "scaling_lambda": NUMBER,
            "reset_thresh_percent": _either(PERCENT, _one_of("none")),
            "resolve_method": _one_of("mass", "normfrac", "normmass", "none"),
            "merge_func": _one_of(
                "dis-mean", "dis-sum", "dis-max", "mean", "sum", "median", "magnitude"),
        },
    ),
    "DARE": Tool(
        None, {"*": "mask_rate use_rescale mask_strategy scaling_coefficient"},
        needs="mask_rate use_rescale scaling_coefficient",
        values={
            "mask_rate": LOST, "use_rescale": FLAG, "scaling_coefficient": NUMBER,
            "mask_strategy": _one_of("random", "magnitude"),
        },
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
OF_VARIANTS = {
    "max_rank": WHOLE, "sv_epsilon": _real(0, 1e6, "a number from 0"), "condition_dim": WHOLE,
    "input_length": WHOLE, "index": TEXT, "full_shapes": OBJECT,
    "modules": _list_of(TEXT, "a list of texts"),
}  # fmt: skip
_CASE = {
    "system": TEXT, "method": TEXT, "parameters": OBJECT,
    "inputs": Value(
        lambda v: v != [] and _list_of(OBJECT, "").fits(v), "a list of objects, one or more"
    ),
}  # fmt: skip


def check_case(case: Any, systems: Sequence[str]) -> None:
    """Of what every case has.

    Args:
        systems: the tools that it may name; none for a conversion, whose method counts.
    Raises:
        AdapterError: `missing_key`, `bad_value`.
    """
    if not isinstance(case, dict):
        raise AdapterError("bad_value", "a case is an object", seen=case)
    _check("a case", {key: case.get(key) for key in _CASE}, set(_CASE), " ".join(_CASE), _CASE)
    if systems and case["system"] not in systems:
        raise AdapterError(
            "bad_value", "the case's system is not known", seen=case["system"],
            limit=list(systems), fix="choose one of them",
        )  # fmt: skip


def check_merge(case: dict[str, Any]) -> None:
    """Of a merge. Raises AdapterError `unknown_key`, `missing_key`, `bad_value`."""
    check_case(case, list(TOOLS))
    system, given = case["system"], case["parameters"]
    tool = TOOLS[system]
    method, where = None, system
    needed = tool.needs
    if tool.key is not None and system != "PEFT":
        _check(system, given, set(given), tool.key, {})
        method, needed = given[tool.key], f"{tool.key} {tool.needs}"
        where = f"{system} {method}"
    reads = tool.reads.get(str(method), tool.reads.get("*"))
    if reads is None:
        raise AdapterError(
            "bad_value", f"{tool.key} names no method of {system}", seen=method,
            limit=sorted(tool.reads), fix="choose one of them",
        )  # fmt: skip
    known = {*reads.split(), *tool.accepts.split(), *(tool.key or "").split()}
    _check(where, given, known | NOTES, needed, tool.values)
    if system == "mergekit":
        models = given.get("models") or []
        if models and len(models) != len(case["inputs"]):
            raise AdapterError(
                "bad_value", f"models of {system} are not as many as the inputs", seen=len(models),
                limit=len(case["inputs"]), fix="give an object for each",
            )  # fmt: skip
        inner = {key: value for model in models for key, value in model.items() if key != "name"}
        nested = inner | (given.get("parameters") or {})
        _check(where, nested, known - {"models", "parameters", "merge_method"}, "", {})


def check_variant(case: dict[str, Any]) -> None:
    """Of a conversion or generation. Raises AdapterError `unknown_key`, `missing_key`,
    `bad_value`."""
    check_case(case, ())
    method, system = case["method"], case["system"]
    row = "rebase_" if method.startswith("rebase_") else method
    names = VARIANTS.get(row)
    if names is None and system.startswith("PEFT tuner "):
        names = _fields(system.removeprefix("PEFT tuner "))
    if names is None:
        names = {"LoRAFactory": "", "LLM-Pruner": ""}.get(system.split(" ")[0], "") + _TUNER
    known = set(names.split())
    _check(f"{system} {method}", case["parameters"], known, NEEDED.get(row, ""), OF_VARIANTS)


def _fields(tuner: str) -> str | None:
    """A PEFT tuner's parameters are its config's."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING  # slow, and the merges do not need it

    found = {kind.value.lower(): row for kind, row in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config = found.get(tuner.split(" ")[0].lower())
    return None if config is None else " ".join(config.__dataclass_fields__)


def _check(
    where: str, given: dict[str, Any], known: set[str], needed: str, values: dict[str, Value]
) -> None:
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
    for key, value in given.items():
        if value is not None and key in values and not values[key].fits(value):
            raise AdapterError(
                "bad_value", f"{key} of {where} is none that is repeated here", seen=value,
                limit=values[key].allowed, fix="mend the value",
            )  # fmt: skip
