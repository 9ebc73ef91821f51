"""Commands as a user runs them, on folders of the fixtures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from make_adapters import FIXTURES
from typer.testing import CliRunner

from vllm_lora_ext.cli import app

ROUTED = FIXTURES / "routed"
NAMES = sorted(path.parent.name for path in ROUTED.glob("*/adapter"))


def good(name: str) -> Path:
    return ROUTED / name / "adapter"


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


def usage_error(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2
    return " ".join(done.output.replace("│", " ").split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nothing_else(folder: Path, *names: str) -> None:
    assert sorted(os.listdir(folder)) == sorted(names)
