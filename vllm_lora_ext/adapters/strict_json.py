"""JSON as adapters may write it: one object, no NaN, no key twice, nothing huge."""

from __future__ import annotations

import json
import math
from typing import Any

from vllm_lora_ext.errors import AdapterError

_DEPTH = 32


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Args:
        name: the file, for messages.
    Raises:
        AdapterError: `bad_json`.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth([value])
        # A lone surrogate would parse, and then break whoever prints the message about it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            "bad_json", f"{name} is not valid JSON: {error}", fix=f"write {name} again"
        ) from error
    if not isinstance(value, dict):
        raise AdapterError("bad_json", f"{name} must hold one JSON object", fix="wrap it in {}")
    return value


def _check_depth(value: Any) -> None:
    """Whoever copies or prints a value goes as deep as it does, on a stack that is full sooner."""
    level = [value]
    for _ in range(_DEPTH):
        inner = (list(v.values()) if isinstance(v, dict) else v for v in level)
        level = [v for held in inner for v in held if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key}' stands there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
