"""Weights: a number, a gradient over the layers, or filters, turned into one number per module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Pair

# A number; a list over the depth; [{"filter": ..., "value": ...}]; or module → number.
Weight = float | Sequence[Any] | Mapping[str, float]
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def scale(pair: Pair, weight: float) -> Pair:
    """`weight · B A`. A weight of 0 leaves rank 0."""
    if weight == 0:
        return Pair(pair.a_RK[:0], pair.b_NR[:, :0])
    return Pair(pair.a_RK, pair.b_NR * weight)


def layer_of(module: str) -> int | None:
    """Index of the layer that a module stands in: the first number in its name."""
    found = _LAYER.search(module)
    return int(found[1]) if found else None


def count_layers(modules: Iterable[str]) -> int:
    """Largest layer index + 1; 0 when no name holds a number."""
    return max((i + 1 for name in modules if (i := layer_of(name)) is not None), default=0)


def resolve(weight: Weight, module: str, layers: int, what: str = "weight") -> float:
    """The number that `weight` means for one module.

    Args:
        weight: a number; a gradient `[w0, w1, ...]` interpolated linearly from the first layer to
            the last (a module outside the layers, such as lm_head, takes the last value); a list
            of `{filter, value}`, the first that fits counts, an entry without filter fits every
            module; or a map of module names to numbers, complete. Spelling as in mergekit,
            https://github.com/arcee-ai/mergekit, but "layers.1" does not fit "layers.11".
        layers: number of the model's layers.
        what: the setting, for messages.
    Raises:
        AdapterError: `bad_value`, `missing_key`, `unknown_key`.
    """
    if isinstance(weight, Mapping):
        if module not in weight:
            raise _uncovered(what, module, "add the module")
        return number(weight[module], f"{what} of {module}")
    if isinstance(weight, (list, tuple)):
        if weight and all(isinstance(entry, Mapping) for entry in weight):
            return _filtered(weight, module, layers, what)
        return _interpolate(weight, module, layers, what)
    return number(weight, what)


def number(value: object, what: str) -> float:
    """`value` as a finite float. Raises AdapterError `bad_value`."""
    try:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        found = float(value) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:  # of a whole number of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise AdapterError(
            "bad_value", f"{what} is no finite number", seen=value, fix="mend the value"
        )
    return found


def _interpolate(values: Sequence[Any], module: str, layers: int, what: str) -> float:
    if not values:
        raise AdapterError(
            "bad_value", f"the gradient of {what} is empty", seen=[], fix="give one value or more"
        )
    points = [number(value, what) for value in values]
    layer = layer_of(module)
    depth = 1.0 if layer is None else layer / max(layers - 1, 1)
    at = min(depth, 1.0) * (len(points) - 1)
    low = min(int(at), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    return points[low] + (at - low) * (points[high] - points[low])


def _filtered(entries: Sequence[Mapping[str, Any]], module: str, layers: int, what: str) -> float:
    for entry in entries:
        if "value" not in entry:
            raise AdapterError(
                "missing_key", f"an entry of {what} has no 'value'", seen=dict(entry),
                fix="write {filter: ..., value: ...}",
            )  # fmt: skip
        for key in sorted(set(entry) - {"filter", "value"}):
            raise AdapterError(
                "unknown_key", f"an entry of {what} holds '{key}'", seen=dict(entry),
                limit=["filter", "value"], fix=f"remove '{key}'",
            )  # fmt: skip
    for entry in entries:
        if fits(entry.get("filter"), module):
            return resolve(entry["value"], module, layers, what)
    raise _uncovered(what, module, "add an entry without 'filter' at the end")


def fits(pattern: object, module: str) -> bool:
    """Whether a filter's text stands in the module's name, numbers only as a whole."""
    if pattern is None or pattern == "*":
        return True
    if not isinstance(pattern, str):
        raise AdapterError("bad_value", "a filter must be a text", seen=pattern)
    head = r"(?<!\d)" if pattern[:1].isdigit() else ""
    tail = r"(?!\d)" if pattern[-1:].isdigit() else ""
    return re.search(head + re.escape(pattern) + tail, module) is not None


def _uncovered(what: str, module: str, fix: str) -> AdapterError:
    return AdapterError("missing_key", f"{what} says nothing about a module", seen=module, fix=fix)
