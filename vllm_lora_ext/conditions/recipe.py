"""Recipe: what an adapter is made of that workers derive from those that they hold.

It travels as the path of the derived adapter's `LoRARequest`, the one thing of a request's adapter
that reaches every worker and outlives a preemption: whoever is asked for the adapter can make it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from vllm_lora_ext.errors import AdapterError

PREFIX = "lora_ext:"
"""Of a path that is a recipe."""

DERIVED_IDS = (1 << 30) + (1 << 29)
"""Ids from here to 2**31 belong to derived adapters."""


@dataclass(frozen=True)
class Part:
    """A loaded adapter, as it stood when the request was taken.

    Args:
        name, lora_id, path: of its `LoRARequest`.
        version: digest of its content.
        scale: folded into B.
    """

    name: str
    lora_id: int
    path: str
    version: str
    scale: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One derived adapter. Its columns, in order: of each part its factor, if the recipe is
    `by_row`, and then those that the part has of its own.

    Args:
        parts: what adds up; at least one.
        by_row: whether each part has a column that multiplies it. Scales stand there then, so that
            requests of other scales and spans share the derived adapter; the parts' are 1.
        user: vector of the request's user, for a part that has a user gate.
        gate: of the request's instruction, fp32 little-endian in base64.
    """

    parts: tuple[Part, ...]
    by_row: bool = False
    user: tuple[float, ...] | None = None
    gate: str | None = None

    @cached_property
    def version(self) -> str:
        """Digest of everything that the adapter's weights depend on: 64 hex digits."""
        return sha256(json.dumps({
            "parts": [[part.version, part.scale] for part in self.parts],
            "by_row": self.by_row, "user": self.user, "gate": self.gate,
        }).encode()).hexdigest()  # fmt: skip

    @cached_property
    def name(self) -> str:
        """The name of the derived adapter: its parts', and what tells it from others of them."""
        return f"{'+'.join(part.name for part in self.parts)}#{self.version[:16]}"

    def lora_id(self, attempt: int = 0) -> int:
        """The id to try: two recipes may meet in one."""
        return DERIVED_IDS + (int(self.version[:15], 16) + attempt) % (1 << 29)

    def path(self) -> str:
        """The recipe as a path."""
        fields = {k: v for k, v in asdict(self).items() if v not in (None, False)}
        return PREFIX + json.dumps(fields, separators=(",", ":"))

    @classmethod
    def parse(cls, path: str) -> Recipe:
        """The inverse of `path`.

        Raises:
            AdapterError: `bad_value`.
        """
        try:
            fields = json.loads(path.removeprefix(PREFIX))
            for name, is_right in _RECIPE.items():
                if not is_right(fields.get(name)):
                    raise ValueError(name)
            fields["parts"] = tuple(map(_part, fields["parts"]))
            if "user" in fields:
                fields["user"] = tuple(fields["user"])
            return cls(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise AdapterError(
                "bad_value", "the path of the adapter is no recipe", seen=str(error),
                fix="leave paths that begin with 'lora_ext:' to the plugin's front end",
            ) from error  # fmt: skip


def is_recipe(path: str) -> bool:
    """Whether a `LoRARequest`'s path is a recipe."""
    return path.startswith(PREFIX)


def _part(fields: Any) -> Part:
    part = Part(**fields)
    for name, kind in (("name", str), ("lora_id", int), ("path", str), ("version", str)):
        if type(getattr(part, name)) is not kind:
            raise ValueError(name)
    if not _is_finite(part.scale):
        raise ValueError("scale")
    return part


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


_RECIPE: Mapping[str, Callable[[Any], bool]] = {
    "parts": lambda value: isinstance(value, list) and len(value) > 0,
    "by_row": lambda value: value is None or type(value) is bool,
    "user": lambda value: (
        value is None or (isinstance(value, list) and all(map(_is_finite, value)))
    ),
    "gate": lambda value: value is None or isinstance(value, str),
}
