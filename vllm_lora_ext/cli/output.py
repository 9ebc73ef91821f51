"""What the commands share: options, tables, JSON, errors, progress. Data goes to stdout only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_lora_ext.errors import AdapterError

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="what the files leave out, as `routing.json` would say it; VALUE is JSON or plain"
        " text, and the option may be repeated",
    ),
]
_COLOURS = {
    "ok": "green", "note": "yellow", "problem": "red", "changed": "red", "missing": "red",
    "served": "green", "convert": "yellow", "refused": "red",
}  # fmt: skip


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """`--set` options as a dict: `k=2` is a number, `order=["a","b"]` a list, `key=abs` a text.

    Raises:
        typer.BadParameter: no `=`, no key, or a key twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"'{pair}' is not KEY=VALUE", param_hint="--set")
        if key in found:
            raise typer.BadParameter(f"'{key}' is set twice", param_hint="--set")
        try:
            # NaN is no JSON; as a text it reaches the reader, which says what it wants instead.
            found[key] = json.loads(text, parse_constant=str)
        except ValueError:
            found[key] = text
    return found


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=index == 0)
    return made


def state(name: str) -> str:
    return f"[{_COLOURS[name]}]{name}[/]"


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def fail(error: AdapterError, as_json: bool, **more: Any) -> NoReturn:
    """Say what is wrong and end with exit code 1.

    Args:
        more: further keys of the JSON object.
    """
    text = error.text
    # The readers speak of routing.json, which is what a server sees.
    wanted = re.match(r"'(\w+)'", error.message) if error.code == "missing_setting" else None
    if wanted:
        text = f"{text.rstrip('.')}, or give it here: --set {wanted[1]}=VALUE."
    if as_json:
        print_json({"ok": False, "error": {"code": error.code, "message": text}, **more})
    else:
        Console(stderr=True).print(f"[red]{error.code}[/]: {escape(text)}", highlight=False)
    raise typer.Exit(1)


@contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's stderr; the function given out starts the next of `total` steps."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        started = 0

        def step(text: str) -> None:
            nonlocal started
            progress.update(task, completed=started, description=escape(text))
            started += 1

        yield step
