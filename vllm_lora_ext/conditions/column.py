"""Column: one number for each token of a request, as a rule over the token's position.

Column c of a step's table holds, in the row of a token, what one part of the request's adapter is
multiplied by there, or one logit of its gate. The rule is a product: a number, times 1 where the
position lies in its spans, belongs to its modalities and stands at or after its invocation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_lora_ext.errors import AdapterError

TEXT = "text"
"""The modality of every position that belongs to no other."""

Spans = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class Column:
    """A rule.

    Args:
        scale: the number; finite in fp32.
        spans: half-open positions [start, stop) of prompt and answer, counted from the prompt's
            start; stop None: to the end. None: every position.
        modalities: kinds of input ("image", ...; "text": no other kind there) that a position must
            have, every one of them.
        invocation: token ids; the rule holds from the first token of their last occurrence in the
            prompt, and nowhere if they do not occur (Activated LoRA, PEFT's rule). Empty: anywhere.
        expert: the name by which a request's `gates` give the number; "": not from there.
    Raises:
        AdapterError: `bad_value`, a field has the wrong type or is out of range.
    """

    scale: float = 1.0
    spans: Spans | None = None
    modalities: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    expert: str = ""

    def __post_init__(self) -> None:
        if not _is_number(self.scale):
            raise _bad("scale", self.scale, "a finite number")
        if self.spans is not None:
            object.__setattr__(self, "spans", _spans(self.spans))
        if not _is_list(self.modalities) or not all(_is_name(m) for m in self.modalities):
            raise _bad("modalities", self.modalities, "a list of names")
        if not _is_list(self.invocation) or not all(_is_position(i) for i in self.invocation):
            raise _bad("invocation", self.invocation, "a list of token ids")
        if not isinstance(self.expert, str):
            raise _bad("expert", self.expert, "a name")
        object.__setattr__(self, "modalities", tuple(self.modalities))
        object.__setattr__(self, "invocation", tuple(self.invocation))

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, JSON-ready."""
        fields: dict[str, Any] = {}
        if self.scale != 1.0:
            fields["scale"] = self.scale
        if self.spans is not None:
            fields["spans"] = [list(span) for span in self.spans]
        for name in ("modalities", "invocation"):
            if getattr(self, name):
                fields[name] = list(getattr(self, name))
        if self.expert:
            fields["expert"] = self.expert
        return fields

    @classmethod
    def from_dict(cls, fields: object) -> Column:
        """The inverse of `to_dict`.

        Raises:
            AdapterError: `bad_value`, it is none; `unknown_key`.
        """
        if not isinstance(fields, Mapping):
            raise _bad("columns", fields, "objects")
        unknown = sorted(map(str, set(fields) - set(cls.__dataclass_fields__)))
        if unknown:
            raise AdapterError(
                "unknown_key", f"a column has an unknown field '{unknown[0]}'",
                limit=", ".join(cls.__dataclass_fields__), fix=f"remove '{unknown[0]}'",
            )  # fmt: skip
        return cls(**fields)


@dataclass(frozen=True)
class Prompt:
    """What the numbers of a request depend on.

    Args:
        length: its positions.
        ids: token ids, -1 where there is none; None: all of it is embeddings.
        modality: kind of input → spans of its positions.
    """

    length: int
    ids: Sequence[int] | None
    modality: Mapping[str, tuple[tuple[int, int], ...]]


def start_of(invocation: Sequence[int], ids: Sequence[int] | None) -> int | None:
    """Position of the first token of the last occurrence of `invocation` in `ids`, if any."""
    if ids is None or not len(invocation) or len(ids) < len(invocation):
        return None
    ids_T = np.asarray(ids, dtype=np.int64)
    last = len(ids_T) - len(invocation)
    found_T = np.ones(last + 1, dtype=bool)
    for at, token in enumerate(invocation):
        found_T &= ids_T[at : at + last + 1] == token
    starts = np.flatnonzero(found_T)
    return int(starts[-1]) if len(starts) else None


def values(columns: Sequence[Column], prompt: Prompt, start: int, stop: int) -> np.ndarray:
    """The columns' numbers at positions start..stop, float32 [stop - start, C]."""
    out_TC = np.zeros((stop - start, len(columns)), dtype=np.float32)
    for c, column in enumerate(columns):
        out_TC[:, c] = np.where(_holds(column, prompt, start, stop), column.scale, 0.0)
    return out_TC


def _holds(column: Column, prompt: Prompt, start: int, stop: int) -> np.ndarray:
    """Where a rule holds, bool [stop - start]."""
    holds_T = np.ones(stop - start, dtype=bool)
    if column.spans is not None:
        holds_T &= _inside(column.spans, start, stop)
    for modality in column.modalities:
        if modality == TEXT:
            for spans in prompt.modality.values():
                holds_T &= ~_inside(spans, start, stop)
        else:
            holds_T &= _inside(prompt.modality.get(modality, ()), start, stop)
    if column.invocation:
        at = start_of(column.invocation, prompt.ids)
        holds_T[: max(0, (stop if at is None else at) - start)] = False
    return holds_T


def _inside(spans: Spans | tuple[tuple[int, int], ...], start: int, stop: int) -> np.ndarray:
    inside_T = np.zeros(stop - start, dtype=bool)
    for first, last in spans:
        inside_T[max(0, first - start) : None if last is None else max(0, last - start)] = True
    return inside_T


def _spans(spans: object) -> Spans:
    if not _is_list(spans):
        raise _bad("spans", spans, "a list of [start, stop] pairs")
    found = []
    for span in spans:  # type: ignore[attr-defined]
        if not _is_list(span) or len(span) != 2:
            raise _bad("spans", span, "[start, stop], stop may be null")
        first, last = span
        if not _is_position(first) or not (last is None or _is_position(last)):
            raise _bad("spans", span, "positions from 0 up")
        if last is not None and last < first:
            raise _bad("spans", span, "a stop that is not before its start")
        found.append((first, last))
    return tuple(found)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and abs(value) <= float(np.finfo(np.float32).max)


def _is_position(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _bad(name: str, seen: object, limit: str) -> AdapterError:
    return AdapterError(
        "bad_value", f"'{name}' of a column is wrong", seen=seen, limit=limit, fix=f"mend '{name}'"
    )
