"""Tables of a PEFT config whose keys are patterns over module names, each with a value.

PEFT matches with Python's `re`, which an untrusted file can keep busy for years. `regex` reads the
same syntax, as in vLLM, and gives up when its time is over.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from math import prod
from typing import Generic, TypeVar

import regex

from vllm_lora_ext.errors import AdapterError

MAX_PATTERNS, MAX_LENGTH = 4096, 2000
# `regex` unrolls counted repetitions: nested, they could take any time and memory to compile.
MAX_REPEATS = 1000
SECONDS = 2.0  # of processor time, for all names and patterns of one table
# What `regex` takes for something else than `re` does: fuzzy matching and POSIX classes.
_OTHER_SYNTAX = re.compile(r"(?<!\\)\{(?!\d*,?\d*\})|\[[:.=]")
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")

Value = TypeVar("Value")


class Patterns(Generic[Value]):
    """The first pattern that matches a module name, or a tail of it after a dot, gives the value.

    Args:
        table: pattern → value.
        field: the table's name, for messages.
    Raises:
        AdapterError: `bad_value`, a pattern that Python does not take or that is too large.
    """

    def __init__(self, table: Mapping[str, Value], field: str) -> None:
        if len(table) > MAX_PATTERNS:
            raise _bad(f"the number of patterns in {field}", len(table), f"up to {MAX_PATTERNS}")
        self._field, self._left = field, SECONDS
        self._table = [(_compile(p, field), p, value) for p, value in table.items()]
        self._found: dict[str, Value | None] = {}

    def __len__(self) -> int:
        return len(self._table)

    def values(self) -> Iterable[Value]:
        return [value for _, _, value in self._table]

    def find(self, module: str) -> Value | None:
        """The value for a module name; None when no pattern matches.

        Raises:
            AdapterError: `bad_value`, the patterns take too long.
        """
        if module not in self._found:
            self._found[module] = self._match(module)
        return self._found[module]

    def _match(self, module: str) -> Value | None:
        for compiled, pattern, value in self._table:
            if self._matches(compiled, pattern, module):
                return value
        return None

    def _matches(self, compiled: regex.Pattern[str], pattern: str, module: str) -> bool:
        start = time.thread_time()
        try:
            found = self._left > 0 and compiled.match(module, timeout=self._left)
        except TimeoutError:
            found = False
        self._left -= time.thread_time() - start
        if self._left <= 0:
            what = f"a pattern of {self._field} is too slow"
            raise _bad(what, pattern, f"{SECONDS:g} seconds for the whole table")
        return bool(found)


def _compile(pattern: str, field: str) -> regex.Pattern[str]:
    counts = [max(map(int, filter(None, found)), default=1) for found in _COUNTS.findall(pattern)]
    if len(pattern) > MAX_LENGTH or prod(max(1, n) for n in counts) > MAX_REPEATS:
        limit = f"{MAX_LENGTH} characters, {{n}} up to {MAX_REPEATS} with all of them multiplied"
        raise _bad(f"a pattern of {field} is too large", pattern, limit)
    if _OTHER_SYNTAX.search(pattern):
        raise _bad(f"a pattern of {field}", pattern, "a regex without a { that repeats nothing")
    whole = rf"(.*\.)?({pattern})$"  # as PEFT's get_pattern_key writes it
    try:
        re.compile(whole)
        return regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise _bad(f"a pattern of {field}", pattern, f"a regex of Python ({error})") from error


def _bad(what: str, seen: object, limit: str) -> AdapterError:
    return AdapterError("bad_value", what, seen=seen, limit=limit, fix="mend the pattern")
