"""What a name in a request may ask for: the methods that merge in seconds, and their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import ALIASES, Method, all_methods
from vllm_lora_ext.merging.ops.spaces import SPACES

RECIPE, DESCRIBE = "recipe", "describe"
SHORT = {
    "d": "density", "e": "energy", "l": "lambda", "n": "normalize", "r": "rank", "s": "seed",
}  # fmt: skip
LONG = {name: short for short, name in SHORT.items()}
_NEEDS_MORE = {
    "soups": "it needs a file of learned weights",
    "dps": "its stages are not a set of adapters",
    "select_layers": "it takes lists",
    "select_ranks": "it takes lists",
    "normalise": "it changes no answer",
}
_UNSAID = ("layers", "svd_clamp")  # the server knows; it takes the SVD of whole matrices
_WHOLE = "full"  # the space of whole weight matrices
_OFFLINE = "merge it offline: vllm-lora-ext merge, then load the result"


@cache
def operations() -> Mapping[str, Method]:
    """By name, each with the parameters that a request may say. Raises as `all_methods`."""
    return {
        name: replace(method, parameters=_sayable(method.parameters))
        for name, method in all_methods().items() if name not in _NEEDS_MORE
    }  # fmt: skip


def _sayable(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in _UNSAID}


def find_operation(name: str) -> Method:
    """The method of a name in a request. Raises AdapterError `bad_mix`, `offline_only`."""
    if name in _NEEDS_MORE:
        raise AdapterError(
            "offline_only", f"'{name}' cannot stand in a request: {_NEEDS_MORE[name]}",
            fix=_OFFLINE,
        )  # fmt: skip
    if name not in operations():
        raise AdapterError(
            "bad_mix", "there is no operation of this name", seen=name,
            limit=[*operations(), RECIPE, DESCRIBE], fix="choose one of them",
        )  # fmt: skip
    return operations()[name]


def normal_options(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an operation under their full names, checked, sorted, without those that say the
    default.

    Raises:
        AdapterError: `unknown_key`, `bad_value`, `offline_only` (full space).
    """
    full: dict[str, Any] = {}
    for name, value in given.items():
        key = SHORT.get(name, ALIASES.get(name, name))
        if key in full:
            raise AdapterError("bad_value", f"'{key}' is given twice", seen=name, fix="keep one")
        full[key] = round(value, 4) if isinstance(value, float) else value
    said = method.said(full, method.name)
    if said.get("compat") in method.whole or said.get("space") == _WHOLE:
        raise AdapterError(
            "offline_only", f"this {method.name} merges whole weight matrices, which takes minutes",
            seen={key: full[key] for key in ("compat", "space") if key in full},
            limit=_allowed(method), fix=_OFFLINE,
        )  # fmt: skip
    return {key: value for key, value in said.items() if value != method.parameters[key]}


def print_options(options: Mapping[str, Any]) -> str:
    """`d=0.3,r=32`: the shortest name of each, by name; options as `normal_options` gives them."""
    said = sorted(f"{LONG.get(key, key)}={_print(value)}" for key, value in options.items())
    return ",".join(said)


def _print(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return str(value)


def _allowed(method: Method) -> dict[str, Sequence[str]]:
    flavours = method.only.get("compat", ())
    return {
        "space": [name for name in SPACES if name != _WHOLE],
        "compat": [flavour for flavour in flavours if flavour not in method.whole],
    }
