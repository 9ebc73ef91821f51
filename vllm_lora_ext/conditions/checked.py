"""Values from outside, checked against a type; what is wrong is an `AdapterError` that names it."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import Field, Strict, TypeAdapter, ValidationError

from vllm_lora_ext.errors import AdapterError

_LARGEST = 3.4e38  # in float32
_LAST = (1 << 53) - 1  # positions and ids: whole numbers that JSON carries everywhere

Number = Annotated[float, Strict(), Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Strict(), Field(ge=0, le=_LAST)]
Text = Annotated[str, Strict(), Field(min_length=1, max_length=1024)]

_TAGS = ("str", "constrained-str", "Ids")  # of pydantic's own, at unions

T = TypeVar("T")


def checked(kind: TypeAdapter[T], value: Any, where: str, fix: str) -> T:
    """The value as `kind` has it.

    Args:
        where: what the value is called, for messages; fix: what to do about a wrong one.
    Raises:
        AdapterError: `bad_value`, with the path of something that is wrong.
    """
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        # Of the branches of a union, the one that fits best.
        first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
        path = where + "".join(map(_step, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown_key(path) from None
        missing = first["type"] == "missing"
        raise AdapterError(
            "bad_value", f"{path} is missing" if missing else f"{path} is wrong",
            seen=None if missing else _short(first["input"], first["type"]),
            limit=None if missing else _plain(first["msg"]), fix="add it" if missing else fix,
        ) from None  # fmt: skip


def unknown_key(path: str, limit: str | None = None) -> AdapterError:
    """The error for a key that nothing knows."""
    return AdapterError(
        "bad_value", f"{path} is unknown", seen=path.rpartition(".")[2], limit=limit,
        fix="remove it, or mend its spelling",
    )  # fmt: skip


def _step(step: int | str) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return "" if step in _TAGS or "[" in step else f".{step}"


def _plain(message: str) -> str:
    """Pydantic's words for whoever writes JSON."""
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    message = re.sub(r" or instance of \w+", "", message)
    return message.replace("tuple", "list").replace("Tuple", "List").replace("dictionary", "object")


def _short(value: object, wrong: str) -> object:
    """What a message shows of a value, which may be large; a text in its quotation marks where it
    stands in the place of something else."""
    if isinstance(value, str) and wrong.endswith("_type"):
        return json.dumps(value[:200])
    if isinstance(value, list | tuple | dict) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)}"
    if value is None:
        return "null"
    return value if isinstance(value, list | str | int | float) else repr(value)[:200]
