"""Files of JSON lines, and engines: what `reward` and `label` share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

Base = Annotated[
    list[str],
    typer.Option(help="the base model: a folder, or a name on the hub; one engine has one"),
]
Input = Annotated[
    Path, typer.Option("--input", metavar="FILE", help="JSON lines, or - for standard input")
]
EngineArgs = Annotated[
    str,
    typer.Option(
        metavar="JSON", help='more options of vLLM\'s LLM, as {"tensor_parallel_size": 2}'
    ),
]


def check_vllm(command: str) -> None:
    """Raises typer.BadParameter where no engine can be started."""
    if importlib.util.find_spec("vllm") is None:
        raise typer.BadParameter("vLLM is not installed; see docs/install.md", param_hint=command)


def read_lines(file: Path) -> list[Any]:
    """The values of a file of JSON lines; empty lines are left out.

    Raises:
        typer.BadParameter: it cannot be read, holds nothing, or a line is no JSON.
    """
    try:
        text = (
            typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text("utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="--input") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                message = f"line {number} of {file} is no JSON: {error}"
                raise typer.BadParameter(message, param_hint="--input") from error
    if not found:
        raise typer.BadParameter(f"{file} holds no line", param_hint="--input")
    return found


def parse_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object from an option. Raises typer.BadParameter."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return value


def print_lines(values: Iterable[Any]) -> None:
    """One line of JSON for each."""
    for value in values:
        print(json.dumps(value))
