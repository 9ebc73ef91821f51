"""LoRAX's `merged_adapters` object as a mix: {ids, weights, merge_strategy, density, ...}.

https://github.com/predibase/lorax: server/lorax_server/utils/merges. The arithmetic is theirs
(`compat=lorax`): weights on A and on B, the first adapter's scale for all, DARE without rescaling.
"""

from __future__ import annotations

import math
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving.mix_name import Mix, hundredths, make, parse

_STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")
_KEYS = ("ids", "weights", "merge_strategy", "density", "majority_sign_method")


def from_lorax(given: Any) -> Mix:
    """The mix that `merged_adapters` names.

    Raises:
        AdapterError: `bad_value`, `unknown_key`, `missing_key`, `bad_mix`.
    """
    if not isinstance(given, dict):
        raise _bad("merged_adapters", given, f"an object with {', '.join(_KEYS)}")
    unknown = sorted(str(key) for key in given if key not in _KEYS)
    if unknown:
        raise AdapterError(
            "unknown_key", "merged_adapters has no such key", seen=unknown[0], limit=_KEYS
        )
    terms = _terms(given.get("ids"), given.get("weights"))
    strategy = given.get("merge_strategy") or "linear"
    if strategy not in _STRATEGIES:
        raise _bad("merge_strategy", strategy, ", ".join(_STRATEGIES))
    options: dict[str, Any] = {"compat": "lorax"}
    if strategy != "linear":
        if not given.get("density"):
            raise AdapterError(
                "missing_key", f"merge_strategy {strategy} needs a density", seen=0,
                limit="above 0 up to 1", fix="say the share of the entries that stays; LoRAX's own"
                " default of 0 keeps nothing",
            )  # fmt: skip
        options["density"] = _number("density", given["density"])
    sign = given.get("majority_sign_method")
    if sign is not None and sign not in ("total", "frequency"):
        raise _bad("majority_sign_method", sign, "total, frequency")
    if sign == "frequency" and strategy.endswith("ties"):
        options["sign"] = sign
    return make(strategy, options, terms)


def _terms(ids: Any, weights: Any) -> list[tuple[str, int]]:
    if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
        raise _bad("ids", ids, "a list of adapters' names")
    if weights is None or weights == []:
        weights = [1.0] * len(ids)
    if not isinstance(weights, list) or len(weights) != len(ids):
        raise _bad("weights", weights, f"a list of {len(ids)} numbers")
    grid = [hundredths(repr(_number("weights", weight))) for weight in weights]
    # A name is read as it would be in a mix.
    names = [parse(f"cat:{name}").terms[0] for name in ids]
    if any(weight != 100 or str(i) != name for i, (name, weight) in zip(ids, names, strict=True)):
        raise _bad("ids", ids, "names of adapters, without weights")
    return [(name, weight) for (name, _), weight in zip(names, grid, strict=True)]


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(key, value, "a number")
    return float(value)


def _bad(key: str, seen: Any, limit: str) -> AdapterError:
    return AdapterError("bad_value", f"{key} of merged_adapters is wrong", seen=seen, limit=limit)
