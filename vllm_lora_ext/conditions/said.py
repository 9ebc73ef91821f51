"""What a request says about its adapters: the field `lora_ext`, parsed and checked.

Whether it fits the adapters that are loaded is for the front end to see; here is what can be said
of the field alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
)  # fmt: skip

from vllm_lora_ext.conditions.checked import Count, Number, Text, checked, unknown_key
from vllm_lora_ext.conditions.column import TEXT
from vllm_lora_ext.errors import AdapterError

FIELD = "lora_ext"

_LARGEST_FACTOR = 1e4
"""Of a scale or a gate. More makes what a model computes overflow, and NaN would stay in the blocks
of the KV cache for whoever gets them next."""
_VALUES = 1 << 16  # numbers, keys and texts of one field
_CHARACTERS = 1 << 20  # of all its texts
_FIX = "correct it, or leave it out"


def _forward(span: tuple[int, int | None]) -> tuple[int, int | None]:
    start, stop = span
    if stop is not None and stop < start:
        raise ValueError("a stop that is not before its start")
    return span


def _of_input(name: str) -> str:
    if name == TEXT:
        raise ValueError(f"kinds of input; '{TEXT}' is what none of them covers")
    return name


def _names(gates: object) -> object:
    """Numbers of experts may be numbers where no JSON makes them text."""
    if not isinstance(gates, dict):
        return gates
    return {str(k) if type(k) is int else k: v for k, v in gates.items()}


Span = Annotated[tuple[Count, Count | None], AfterValidator(_forward)]
ClosedSpan = Annotated[tuple[Count, Count], AfterValidator(_forward)]


Factor = Annotated[Number, Field(ge=-_LARGEST_FACTOR, le=_LARGEST_FACTOR)]
_FIRST = Field(fail_fast=True)  # of many wrong numbers, only the first
Spans = Annotated[tuple[Span, ...], _FIRST]
ClosedSpans = Annotated[tuple[ClosedSpan, ...], _FIRST]
Kind = Annotated[Text, AfterValidator(_of_input)]


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Checked):
    """One of a request's adapters.

    Args:
        name: of a loaded adapter; scale: multiplies what it adds.
        spans: half-open positions of prompt and answer where it acts; None: everywhere.
        modality: acts on tokens that stand for this kind of input only.
    """

    name: Text
    scale: Factor = 1.0
    spans: Spans | None = None
    modality: Text | None = None

    @property
    def by_token(self) -> bool:
        """Whether it differs by token."""
        return self.spans is not None or self.modality is not None


class Ids(_Checked):
    """A text as token ids."""

    ids: Annotated[tuple[Count, ...], Field(min_length=1), _FIRST]


class Said(_Checked):
    """The field, as `docs/requests.md` has it."""

    adapters: Annotated[tuple[Entry, ...], _FIRST] | None = None
    user: Annotated[tuple[Number, ...], _FIRST] | None = None
    gates: Annotated[dict[Text, Factor], BeforeValidator(_names)] | None = None
    modality_spans: dict[Kind, ClosedSpans] | None = None
    instruction: Annotated[str, Strict(), Field(min_length=1)] | Ids | None = None
    trace: bool | None = None

    def check_limits(self, max_adapters: int, max_spans: int) -> None:
        """Raises AdapterError `bad_value`: more of something than a server takes."""
        entries = self.adapters or ()
        if len(entries) > max_adapters:
            raise AdapterError(
                "bad_value", f"{FIELD}.adapters has too many entries", seen=len(entries),
                limit=f"max_request_adapters {max_adapters}", fix="name fewer adapters",
            )  # fmt: skip
        count = sum(len(spans) for spans in self._spans())
        if count > max_spans:
            raise AdapterError(
                "bad_value", f"{FIELD} has too many spans", seen=count,
                limit=f"max_request_spans {max_spans}", fix="say it with fewer spans",
            )  # fmt: skip

    def check_positions(self, most: int) -> None:
        """Raises AdapterError `bad_value`: a span is where no request of this model has tokens."""
        for i, entry in enumerate(self.adapters or ()):
            for j, (start, stop) in enumerate(entry.spans or ()):
                if start >= most or (stop or 0) > most:
                    raise AdapterError(
                        "bad_value", f"{FIELD}.adapters[{i}].spans[{j}] is outside of every"
                        " request of this model", seen=[start, stop],
                        limit=f"positions below max_model_len {most}; null: to the end",
                        fix=_FIX,
                    )  # fmt: skip

    def _spans(self) -> Iterator[tuple[Any, ...]]:
        yield from (entry.spans or () for entry in self.adapters or ())
        yield from (self.modality_spans or {}).values()


@cache
def _checker() -> TypeAdapter[Said]:
    return TypeAdapter(Said)


def parse(value: object, max_adapters: int, max_spans: int) -> Said:
    """The field, from a dict or from JSON text; one that was parsed before is itself.

    Raises:
        AdapterError: `bad_value`, with the path of what is wrong.
    """
    if isinstance(value, Said):
        return value
    if isinstance(value, str):
        value = _read(value)
    if not isinstance(value, dict):
        raise AdapterError(
            "bad_value", f"{FIELD} of the request is no object", seen=type(value).__name__,
            limit=f"an object with any of {', '.join(Said.model_fields)}, or the same as JSON text",
            fix=_FIX,
        )  # fmt: skip
    unknown = next((key for key in value if key not in Said.model_fields), None)
    if unknown is not None:
        raise unknown_key(f"{FIELD}.{str(unknown)[:80]}", ", ".join(Said.model_fields))
    _check_size(value)
    said = checked(_checker(), value, FIELD, _FIX)
    said.check_limits(max_adapters, max_spans)
    return said


def _read(text: str) -> object:
    if len(text) > _CHARACTERS:
        raise _too_large(f"{len(text)} characters", f"{_CHARACTERS} characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            "bad_value", f"{FIELD} of the request is no JSON", seen=str(error) or text[:80],
            limit="an object as JSON text", fix=_FIX,
        ) from None  # fmt: skip


def _check_size(value: object) -> None:
    """Looks at no more of the value than may be."""
    left, values, characters = [value], 0, 0
    while left:
        item = left.pop()
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, list | tuple | dict):
            values += len(item)
            if values <= _VALUES:
                left += [k for k in item if isinstance(k, str | list | tuple | dict)]
                left += item.values() if isinstance(item, dict) else ()
        if values > _VALUES or characters > _CHARACTERS:
            raise _too_large(
                f"more than {_VALUES} values or {_CHARACTERS} characters",
                f"{_VALUES} values, {_CHARACTERS} characters",
            )


def _too_large(seen: str, limit: str) -> AdapterError:
    return AdapterError(
        "bad_value", f"{FIELD} of the request is too large", seen=seen, limit=limit, fix=_FIX
    )
