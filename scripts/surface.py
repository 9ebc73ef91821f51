"""Writes docs/surface.json: everything that a user may rely on, in one file that a diff shows.

    python scripts/surface.py           # write; `make surface`
    python scripts/surface.py --check   # exit code 1 when it differs

Settings, what a request may say, recipes, merge methods with their parameters, routes, headers and
metrics, environment variables, commands with their options, error codes with their HTTP status,
formats, gates and the names that Python offers. A change of it is a change for users: CHANGELOG.md
says what they have to do (docs/support.md).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer.main

from vllm_lora_ext.adapters import registry
from vllm_lora_ext.cli import app
from vllm_lora_ext.conditions.said import FIELD, Said
from vllm_lora_ext.merging import methods
from vllm_lora_ext.merging.recipes.schema import Recipe
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.settings import LoraExtSettings

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "surface.json"
OFFERS = (
    "vllm_lora_ext", "vllm_lora_ext.adapters", "vllm_lora_ext.merging",
    "vllm_lora_ext.merging.generate", "vllm_lora_ext.merging.variants", "vllm_lora_ext.routing",
)  # fmt: skip
_HTTP = re.compile(r"/v1/lora_ext/\S+|x-lora-ext-[a-z-]+")
_VARIABLE = re.compile(r"VLLM_LORA_EXT_[A-Z_]+")
_METRIC = re.compile(r"lora_ext:[a-z_]+[a-z]")
_CODE = re.compile(r"^\| `(\w+)` \|.*\| (\d+|\*start\*)[^|]* \|[^|]*\|$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = json.dumps(surface(), indent=1, sort_keys=True) + "\n"
    stale = not FILE.is_file() or FILE.read_text(encoding="utf-8") != text
    if stale and not options.check:
        FILE.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'differs' if options.check else 'written'}: {FILE.relative_to(ROOT)}")
    return int(stale and options.check)


def surface() -> dict[str, Any]:
    """All of it, JSON-ready."""
    errors = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return {
        "settings": _schema(LoraExtSettings.model_json_schema()),
        f"request field {FIELD}": _schema(Said.model_json_schema()),
        "recipes": _schema(Recipe.model_json_schema()),
        "merge methods": {
            name: dict(method.parameters) for name, method in methods.METHODS.items()
        },
        "http": sorted(_spelled(_HTTP)),
        "environment": sorted(_spelled(_VARIABLE)),
        "metrics": sorted(set(_METRIC.findall((ROOT / "docs" / "operations.md").read_text()))),
        "commands": _commands(),
        "error codes": dict(sorted(_CODE.findall(errors))),
        "formats": {reader.name: reader.status for reader in registry.FORMATS},
        "entry points of other packages": sorted([registry.ENTRY_POINTS, methods.ENTRY_POINTS]),
        "gate": sorted(GateSpec.__dataclass_fields__),
        "python": {name: sorted(importlib.import_module(name).__all__) for name in OFFERS},
    }


def _schema(found: Any) -> Any:
    """A JSON schema without its texts: those may be mended at any time."""
    if isinstance(found, Mapping):
        dull = {"description", "title"} if "type" in found or "anyOf" in found else {"title"}
        return {key: _schema(value) for key, value in found.items() if key not in dull}
    return [_schema(item) for item in found] if isinstance(found, list) else found


def _spelled(words: re.Pattern[str]) -> set[str]:
    """Routes and headers, or variables, wherever the code spells one."""
    found = set()
    for folder in ("model_patches", "vllm_lora_ext"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update([node.value] if words.fullmatch(node.value) else [])
    return found


def _commands() -> dict[str, dict[str, Any]]:
    """Command → option or argument → its default, or that there must be one."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {
            "/".join([*p.opts, *p.secondary_opts]): "required" if p.required else _plain(p.default)
            for p in command.params
        }
        for name, command in commands.items()
    }


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # of an enumeration
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


if __name__ == "__main__":
    sys.exit(main())
