"""Tensor names as PEFT-like savers write them: prefix, module, what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_lora_ext.adapters.folder import missing_tensor
from vllm_lora_ext.errors import AdapterError

PREFIX = "base_model.model."


def module_of(name: str) -> str:
    """A module's name in the Hugging Face model, without the wrapper's prefix."""
    return name.removeprefix(PREFIX)


def group(names: Iterable[str], pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """Tensors by module and part.

    Args:
        names: all tensor names; those that `pattern` does not match are left out.
        pattern: must match whole names and have groups `module` and `part`.
    Returns:
        module → part → tensor name.
    Raises:
        AdapterError: `duplicate_tensor`, two names mean the same tensor.
    """
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        parts = found.setdefault(module_of(match["module"]), {})
        if match["part"] in parts:
            raise AdapterError(
                "duplicate_tensor", "two tensors of the file stand for the same one",
                seen=[parts[match["part"]], name], fix="save one adapter per folder",
            )  # fmt: skip
        parts[match["part"]] = name
    return found


def part(parts: dict[str, str], wanted: str, module: str) -> str:
    """The tensor name of a part of a module. Raises AdapterError `missing_tensor`."""
    if wanted not in parts:
        beside = ", ".join(sorted(parts))
        raise missing_tensor(f"{module}.{wanted}", f" (found for this layer: {beside})")
    return parts[wanted]


def rank_mismatch(name: str, seen: tuple[int, ...], wanted: str) -> AdapterError:
    """The error for a tensor whose rank is not the configured one."""
    return AdapterError(
        "rank_mismatch", f"tensor '{name}' has another rank than the configuration says",
        seen=list(seen), limit=wanted, fix="mend the configuration, or save the adapter again",
    )  # fmt: skip
