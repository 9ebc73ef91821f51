"""Runs the case of a merge fixture through the public merge path and writes a PEFT folder.

    python -m tests.merging.run_case CASE_DIR OUT_DIR
    python tests/merging/run_case.py CASE_DIR OUT_DIR [--rank R]

The inputs' paths in `case.json` start at the folder above CASE_DIR. A case is understood by its
system, method and parameters alone, becomes a recipe, and is run as every recipe is; conversions of
one artefact are those of `run_variant.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Merged, save_peft
from vllm_lora_ext.merging.recipes import parse_recipe, run_recipe

sys.path.insert(0, str(Path(__file__).resolve().parent))
from case_parameters import check_case, check_merge, check_variant
from run_variant import factors_of, handles

Case = dict[str, Any]


class Call(NamedTuple):
    """What the recipe says; own: parameters of single adapters; weights: in place of the case's."""

    method: str
    parameters: dict[str, Any]
    own: list[dict[str, Any]] | None = None
    weights: list[float] | None = None


def peft(case: Case) -> Call:
    """`add_weighted_adapter`; a case without a combination type is the plain sum."""
    given = case["parameters"]
    kind = given.get("combination_type")
    if kind is None:
        return Call("cat", {})
    if len(case["inputs"]) == 1:
        return Call("linear", {"compat": "peft"})  # whatever the type
    factors = ("density", "majority_sign_method")
    parameters = {"compat": "peft", **_some(given, *factors)}
    if kind in ("cat", "linear"):
        return Call(kind, {"compat": "peft"})
    if not kind.endswith("svd"):
        return Call(kind, parameters)
    parameters |= _some(given, "svd_rank", "svd_clamp")
    if kind == "svd":
        return Call(kind, {k: v for k, v in parameters.items() if k not in factors})
    return Call(kind.removesuffix("_svd"), {**parameters, "space": "full"})


def mergekit(case: Case) -> Call:
    """A recipe of mergekit, its switches taken over by name."""
    given = case["parameters"]
    kind, switches = given["merge_method"], {**given, **(given.get("parameters") or {})}
    own = [_some(model, "density", "epsilon", "gamma") for model in given.get("models") or []]
    if kind in ("linear", "task_arithmetic"):
        normalize = _or(switches, "normalize", kind == "linear")
        return Call("cat", {"normalize": normalize, **_some(switches, "lambda")})
    names = ("normalize", "rescale", "lambda", "density", "epsilon", "gamma")
    return Call(kind, {"compat": "mergekit", **_some(switches, *names)}, own or None)


def lorax(case: Case) -> Call:
    """`merged_adapters` of a request; density counts where entries are dropped."""
    given = case["parameters"]
    kind = given["merge_strategy"]
    names = () if kind == "linear" else ("density", "majority_sign_method")
    if kind == "dare_linear":
        names = ("density",)
    return Call(kind, {"compat": "lorax", **_some(given, *names)})


def lorahub(case: Case) -> Call:
    return Call("lorahub", {})


def core_space(case: Case) -> Call:
    """One coefficient multiplies the merged delta; the tool has no weights, but defaults."""
    given, ones = case["parameters"], [1.0] * len(case["inputs"])
    kind, coefficient = given["merge_method"], given["scaling_coeff"]
    if kind in ("tv", "sum", "mean"):
        coefficient /= len(ones) if kind == "mean" else 1
        if not given.get("isotropize"):
            return Call("cat", {"lambda": coefficient}, weights=ones)
        kind = "iso"
    parameters = {"lambda": coefficient, "compat": "core_space", "space": given["merge_space"]}
    if kind == "iso":
        return Call(kind, parameters, weights=ones)
    parameters["isotropise"] = _or(given, "isotropize", False)
    if kind == "dare":
        kind, parameters["density"] = "dare_linear", 1 - _or(given, "dare_pruning_coeffs", 0.3)
    elif kind == "cart":
        parameters["keep"] = _or(given, "cart_pruning_rank", 0.04)
        parameters["strength"] = _or(given, "cart_scaling_coeffs", 0.1)
    elif kind in ("ties", "dare-ties", "dare_ties"):
        if kind != "ties":
            parameters["drop"] = _or(given, "dare_pruning_coeffs", 0.3)
        kind, parameters["density"] = "ties", _share(_or(given, "topK", 10))
    return Call(kind, parameters, weights=ones)


def knots(case: Case) -> Call:
    """The code multiplies every adapter by the first coefficient; DARE comes before TIES."""
    given, ones = case["parameters"], [1.0] * len(case["inputs"])
    coefficients = given["scaling_coeffs"]
    percent = _or(given, "topK_percent", _or(given, "topK", 100))
    parameters = {
        "density": _share(percent), "divide": _DIVIDE[_or(given, "merging_type", "mean")],
        "lambda": coefficients if isinstance(coefficients, (int, float)) else coefficients[0],
        "sign": {"ties": "total", "tv": "none"}[given["merge_method"]],
    }  # fmt: skip
    coefficient = given.get("dare_pruning_coeffs")
    if given.get("dare") and coefficient is None:
        raise AdapterError(
            "missing_key", "KnOTS' dare needs the parameter dare_pruning_coeffs",
            fix="give 'dare_pruning_coeffs', or set dare to false",
        )  # fmt: skip
    if given.get("dare", bool(coefficient)):
        parameters["drop"] = coefficient
    return Call("knots_ties", parameters, weights=ones)


def ties_original(case: Case) -> Call:
    """`merge_methods`: trim, resolve signs, and a merge that begins with `dis` for disjoint."""
    given = case["parameters"]
    share, function = given["reset_thresh_percent"], given["merge_func"]
    divide = {f"dis-{name}": rule for name, rule in _DIVIDE.items()} | _EVERYBODY
    signs = {"mass": "total", "normfrac": "normfrac", "normmass": "normmass", "none": "none"}
    parameters = {
        "compat": "ties_original", "density": 1.0 if share == "none" else _share(share),
        "lambda": given["scaling_lambda"], "divide": divide[function],
        "sign": signs[_or(given, "resolve_method", "mass")],
        "join": "voters" if function.startswith("dis") else "all",
    }  # fmt: skip
    return Call("ties", parameters, weights=_weights(case, given["scaling_lambda"]))


def mergelm(case: Case) -> Call:
    given = case["parameters"]
    parameters = {
        "compat": "mergelm", "density": 1 - given["mask_rate"], "rescale": given["use_rescale"],
        "lambda": given["scaling_coefficient"],
    }  # fmt: skip
    kind = {"random": "dare_linear", "magnitude": "magnitude_prune"}[
        _or(given, "mask_strategy", "random")
    ]
    return Call(kind, parameters, weights=_weights(case, given["scaling_coefficient"]))


def _weights(case: Case, coefficient: float) -> list[float]:
    """Of a tool with one coefficient, which a case may repeat as each input's weight."""
    given = [entry.get("weight", 1.0) for entry in case["inputs"]]
    return [1.0] * len(given) if given == [coefficient] * len(given) else given


def robustmerge(case: Case) -> Call:
    return Call("robustmerge", _some(case["parameters"], "mask_ratio", "att_ratio", "fuse_weight"))


def soups(case: Case) -> Call:
    return Call("soups", {"mode": case["parameters"]["lora_mix_mode"]})


_DIVIDE = {"mean": "voters", "sum": "none", "max": "largest"}
_EVERYBODY = {"mean": "adapters", "sum": "none", "median": "median", "magnitude": "largest"}
SYSTEMS: dict[str, Callable[[Case], Call]] = {
    "PEFT": peft, "mergekit": mergekit, "LoRAX": lorax, "LoraHub": lorahub,
    "Core Space": core_space, "KnOTS": knots, "TIES-Merging": ties_original, "DARE": mergelm,
    "RobustMerge": robustmerge, "LoRA-Soups": soups,
}  # fmt: skip


def recipe_of(case_dir: Path, case: Case, rank: int | None = None) -> dict[str, Any]:
    """The recipe that a case means; its paths start at the folder above the case.

    Args:
        rank: largest rank of the result, in place of the case's own.
    """
    check_merge(case)
    call = SYSTEMS[case["system"]](case)
    inputs = case["inputs"]
    for entry in inputs:
        if "adapter" not in entry:
            raise AdapterError("missing_key", "an input names no adapter", seen=entry)
    weights = call.weights or [entry.get("weight", 1.0) for entry in inputs]
    models = []
    for entry, weight, own in zip(inputs, weights, call.own or [{}] * len(inputs), strict=True):
        if weight == "learned":
            weight = {"from": entry["adapter"], "kind": "lora_soups_softmax"}
        model = {"model": entry["adapter"], "parameters": {"weight": weight, **own}}
        models.append(model | _some(entry, "name"))
    parameters = {**call.parameters, **({} if rank is None else {"rank": rank})}
    recipe = {
        "version": 1, "merge_method": call.method, "models": models, "parameters": parameters,
    }  # fmt: skip
    if (case_dir / "masks.safetensors").exists():
        recipe["masks"] = f"{case_dir.name}/masks.safetensors"
    return recipe


def merge_case(case_dir: Path, case: Case, rank: int | None = None) -> Merged:
    """The merge that a case describes."""
    recipe = parse_recipe(recipe_of(case_dir, case, rank))
    return run_recipe(recipe, lambda name: case_dir.parent / name)


def run_case(case_dir: Path, rank: int | None = None) -> Factors:
    """The adapter that a case gives."""
    return adapter_of(case_dir, json.loads((case_dir / "case.json").read_text()), rank)


def adapter_of(case_dir: Path, case: Any, rank: int | None = None) -> Factors:
    """The adapter that a case gives. Raises AdapterError, whatever its parameters are."""
    check_case(case, ())
    if handles(case):
        check_variant(case)
        return factors_of(case_dir, case, rank)
    return merge_case(case_dir, case, rank).factors


def _some(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: table[name] for name in names if table.get(name) is not None}


def _or(table: dict[str, Any], name: str, default: Any) -> Any:
    """A null counts as not said."""
    return default if table.get(name) is None else table[name]


def _share(percent: float) -> float:
    """The tools read numbers above 1 as percent."""
    return percent / 100 if percent > 1 else float(percent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=None, help="largest rank of the result")
    args = parser.parse_args()
    torch.manual_seed(0)  # nothing may depend on it
    folder = save_peft(run_case(args.case.resolve(), args.rank), args.out)
    print(folder)


if __name__ == "__main__":
    main()
