"""The names of mixes: `cat:math*0.6+code*0.4`, `svd[r=32]:a+b`, `recipe:weekly`, `describe:"…"`.

A name is parsed strictly and printed in one canonical form, so that two spellings of one mix are
one adapter. Weights live on a grid of 0.01; terms are sorted where the method does not care.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving.operations import (
    DESCRIBE,
    RECIPE,
    find_operation,
    normal_options,
    operations,
    print_options,
)

LONGEST, LARGEST_WEIGHT = 2000, 100
_HEAD = re.compile(r"[a-z_]+")
_NAME = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)?")
_KEY = re.compile(r"[a-z_]+")
_NUMBER = re.compile(r"-?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})", re.ASCII)
_WORD = re.compile(r"[a-z0-9_]+")
_GRAMMAR = 'op[option=value,…]:name*weight+name*weight, recipe:name or describe:"text"'


@dataclass(frozen=True)
class Mix:
    """One mix in its normal form; equal mixes are equal objects with equal names.

    Args:
        op: the operation; `recipe` and `describe` have an argument and no terms.
        options: full name → value, sorted, defaults left out.
        terms: (adapter, weight in hundredths), sorted by name where the order does not matter.
        argument: the recipe's name, or the description.
    """

    op: str
    options: tuple[tuple[str, Any], ...] = ()
    terms: tuple[tuple[str, int], ...] = ()
    argument: str = ""

    def __str__(self) -> str:
        if self.op == DESCRIBE:
            return f"{self.op}:{json.dumps(self.argument, ensure_ascii=False)}"
        if self.op == RECIPE:
            return f"{self.op}:{self.argument}"
        options = print_options(dict(self.options))
        terms = "+".join(_print_term(name, weight) for name, weight in self.terms)
        return f"{self.op}{f'[{options}]' if options else ''}:{terms}"


def is_mix_name(text: str) -> bool:
    """True for what must be a mix or an error, and no other model's name."""
    head, colon, rest = text.partition(":")
    op = head.partition("[")[0]
    known = op in (*operations(), RECIPE, DESCRIBE)
    return bool(colon) and (known or bool(set(head + rest) & set("[*+")))


def parse(text: str) -> Mix:
    """The mix behind a name.

    Raises:
        AdapterError: `bad_mix` (with the column, from 1, where the name stops making sense),
            `offline_only`, `unknown_key`, `bad_value`.
    """
    if len(text) > LONGEST:
        raise AdapterError("bad_mix", "the name is too long", seen=len(text), limit=LONGEST)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AdapterError("bad_mix", f"column {error.start + 1}: half of a character") from None
    cursor = _Cursor(text)
    op = cursor.take(_HEAD, "an operation, such as cat")
    if op in (RECIPE, DESCRIBE):
        cursor.expect(":")
        argument = cursor.name() if op == RECIPE else cursor.quoted()
        cursor.end()
        return Mix(op, argument=argument)
    with cursor.at_column(0):
        find_operation(op)
    start = cursor.at
    options = cursor.options() if cursor.skip("[") else {}
    cursor.expect(":")
    terms = [cursor.term()]
    while cursor.skip("+"):
        terms.append(cursor.term())
    cursor.end()
    with cursor.at_column(start):
        return make(op, options, terms)


def make(op: str, options: Mapping[str, Any], terms: Iterable[tuple[str, int]]) -> Mix:
    """A mix in its normal form; weights in hundredths.

    Raises:
        AdapterError: as `parse`.
    """
    method = find_operation(op)
    listed = list(terms)
    names = [name for name, _ in listed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise AdapterError(
            "bad_mix", f"'{twice}' is in the mix twice", fix="add its weights up"
        )  # fmt: skip
    found = normal_options(method, options)
    # A tool may take something from the first adapter.
    commutes = method.commutes and "compat" not in found
    return Mix(op, tuple(found.items()), tuple(sorted(listed) if commutes else listed))


def hundredths(text: str) -> int:
    """A weight on the grid. Raises AdapterError `bad_value`."""
    value = Decimal(text)
    if abs(value) > LARGEST_WEIGHT:
        raise AdapterError(
            "bad_value", "a weight is too large", seen=text, limit=f"up to {LARGEST_WEIGHT}"
        )
    weight = round(value * 100)
    if weight == 0:
        raise AdapterError(
            "bad_value", "a weight is 0 on the grid of 0.01", seen=text,
            fix="leave the adapter out",
        )  # fmt: skip
    return weight


def _print_term(name: str, weight: int) -> str:
    return name if weight == 100 else f"{name}*{weight / 100:.6g}"


class _Cursor:
    """A place in the text, and what is read from there on."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, expected: str, at: int | None = None) -> AdapterError:
        at = self.at if at is None else at
        return AdapterError(
            "bad_mix", f"column {at + 1}: {expected} is expected",
            seen=self.text[at : at + 20] or "the end", limit=_GRAMMAR,
        )  # fmt: skip

    def at_column(self, at: int) -> _AtColumn:
        return _AtColumn(at)

    def skip(self, sign: str) -> bool:
        found = self.text.startswith(sign, self.at)
        self.at += len(sign) if found else 0
        return found

    def expect(self, sign: str) -> None:
        if not self.skip(sign):
            raise self.fail(f"'{sign}'")

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.fail(what)
        self.at = found.end()
        return found[0]

    def end(self) -> None:
        if self.at < len(self.text):
            raise self.fail("the end")

    def name(self) -> str:
        return self.take(_NAME, "a name of letters, digits, '-', '_', '.' and one '/'")

    def term(self) -> tuple[str, int]:
        name = self.name()
        if not self.skip("*"):
            return name, 100
        start = self.at
        number = self.take(_NUMBER, "a weight, such as 0.6 or -0.3,")
        with self.at_column(start):
            return name, hundredths(number)

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.skip("]"):
            if found:
                self.expect(",")
            start = self.at
            key = self.take(_KEY, "an option, such as r=32,")
            if key in found:
                raise self.fail("each option once", start)
            self.expect("=")
            found[key] = self.value()
        return found

    def value(self) -> Any:
        number = _NUMBER.match(self.text, self.at)
        word = _WORD.match(self.text, self.at)
        if number and not (word and word.end() > number.end()):
            self.at = number.end()
            whole = number[0].lstrip("-").isdigit()
            return int(number[0]) if whole else float(number[0])
        text = self.take(_WORD, "a number or a word")
        return {"true": True, "false": False}.get(text, text)

    def quoted(self) -> str:
        """A JSON string; runs of blanks count as one."""
        start = self.at
        try:
            text, self.at = json.JSONDecoder().raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            raise self.fail("a text in double quotes, written as in JSON,", error.pos) from None
        words = " ".join(text.split()) if isinstance(text, str) else ""
        if not words:
            raise self.fail("a text in double quotes, not empty,", start)
        try:
            words.encode()
        except UnicodeEncodeError:
            raise self.fail("a text of whole characters", start) from None
        return words


class _AtColumn:
    """Puts the column in front of an error's message."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, AdapterError):
            text = f"[lora_ext:{error.code}] column {self.at + 1}: {error.text} [/lora_ext]"
            raise AdapterError.parse(text) or error from None
