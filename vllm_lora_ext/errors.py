"""The one error type that crosses every floor of the house.

An `AdapterError` survives being turned into text and back: engine processes hand their
exceptions to the front end as strings, so `str(error)` carries the code in front, and
`AdapterError.parse` finds it again in whatever vLLM wrapped around it.
"""

from __future__ import annotations

import json
import re

_MARK = re.compile(r"\[lora_ext:(?P<code>[a-z_]+)\] (?P<message>.*?) \[/lora_ext\]", re.DOTALL)


class AdapterError(ValueError):
    """An adapter, or a request for one, that cannot be served.

    Args:
        code: stable, machine-readable (`docs/errors.md` lists them all).
        message: one sentence that names the field.
        seen: the value found, if there is one.
        limit: what is allowed.
        fix: what the user can do.
    """

    def __init__(
        self, code: str, message: str, *, seen: object = None, limit: object = None, fix: str = ""
    ) -> None:
        self.code = code
        self.message = _sendable(message)
        parts = [self.message.rstrip(".")]
        if seen is not None:
            parts.append(f"seen: {_show(seen)}")
        if limit is not None:
            parts.append(f"allowed: {_show(limit)}")
        if fix:
            parts.append(f"fix: {_sendable(fix).rstrip('.')}")
        self.text = "; ".join(parts) + "."
        super().__init__(f"[lora_ext:{code}] {self.text} [/lora_ext]")

    @classmethod
    def parse(cls, text: str) -> AdapterError | None:
        """The error whose text stands somewhere in `text`, or None."""
        found = _MARK.search(text)
        if found is None:
            return None
        error = cls(found["code"], found["message"])
        error.text = found["message"]
        error.args = (found[0],)
        return error

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (str(self),))


def _rebuild(text: str) -> AdapterError:
    error = AdapterError.parse(text)
    assert error is not None
    return error


def _sendable(text: str, most: int = 2000) -> str:
    """Names in it may be of any length, and hold half a character, as JSON may: that has no bytes,
    and no answer and no log could show it."""
    text = text if len(text) <= most else text[:most] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _show(value: object) -> str:
    if isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = repr(value)
    return _sendable(text, 200)
