"""Imports only go down the floors that docs/architecture.md draws, and never in a circle."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_lora_ext"
MAPPED = ("routing", "kernels", "model_patches")
ALONE = ("settings", "errors")  # modules that are rooms of their own; the others are `tools`
BOTTOM = (PACKAGE, "__init__")  # offers the error type and the version to everybody

# Other packages, and the rooms that may know them.
OUTSIDE = {
    "vllm": ("model_patches",),
    "fastapi": ("model_patches",),
    "msgspec": ("model_patches",),
    "triton": ("kernels",),
    "typer": ("cli",),
    "rich": ("cli",),
    "matplotlib": ("trace",),
    "yaml": ("merging",),
}
OUTSIDE_EXCEPTIONS = {
    ("verify", "vllm"): "`verify --engine` is a program that uses vLLM's public `LLM`",
    ("cli.verify", "vllm"): "the same",
    ("engines", "vllm"): "starts vLLM's public `LLM` for the tools",
    ("reward", "vllm"): "the configuration of that `LLM`",
    ("labels", "vllm"): "asks that `LLM`",
    ("cli.label", "vllm"): "the same",
}
# Inside model_patches: the API server's process must not load what runs on a worker's device.
FRONT = (
    "adapters_http", "admin", "admission", "admitted", "dead_core", "driving", "engine_metrics",
    "exchange", "frontend", "metrics", "mixes", "request_classes", "request_says", "request_steps",
    "request_settled", "rewards", "says_http", "scoring", "trace_http",
)  # fmt: skip
WORKER = (
    "backend", "columns", "composing", "deriving", "graphs", "heap", "layer_sizes", "layers",
    "layouts", "loader", "logits", "manager", "mlp", "placing", "products", "punica", "residency",
    "sleep", "stock_lane", "trace", "worker",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, both without the package's name."""

    module: str
    target: str
    line: int
    at_once: bool  # when the module is imported, not when a function is called


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == PACKAGE else parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    folders = (PACKAGE, *MAPPED)
    return {_name(path): path for folder in folders for path in (ROOT / folder).rglob("*.py")}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a module but what only type checkers import."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield node
            yield from _nodes(node)


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole.removeprefix(f"{PACKAGE}.") in modules() else node.module


@cache
def imports() -> tuple[list[Import], list[Import]]:
    """Imports of the product: of each other, and of other packages."""
    ours, others = [], []
    for module, path in modules().items():
        for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
            assert not getattr(node, "level", 0), f"{path}: a relative import"
            at = getattr(node, "lineno", 0), getattr(node, "col_offset", 0) == 0
            for target in _imported(node):
                if target.split(".")[0] == PACKAGE:
                    ours.append(Import(module, target.removeprefix(f"{PACKAGE}."), *at))
                elif target.split(".")[0] not in sys.stdlib_module_names:
                    others.append(Import(module, target, *at))
    return ours, others


def room(module: str) -> str:
    first = module.split(".")[0]
    if module in BOTTOM:
        return "errors"
    folder = first != "__init__" and modules().get(first, Path()).name == "__init__.py"
    return first if folder or first in ALONE else "tools"


@cache
def floors() -> dict[str, int]:
    """Room → floor, as the picture has it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"```text\nfloor  rooms\n(.*?)```", text, re.DOTALL)
    found = {}
    for line in picture.splitlines():
        number, rooms = line.split(maxsplit=1)
        found |= dict.fromkeys((name.strip() for name in rooms.split("·")), int(number))
    return found


def test_every_room_is_drawn() -> None:
    assert {room(module) for module in modules()} == set(floors())


def test_imports_go_down() -> None:
    wrong = [
        f"{i.module}:{i.line} ({room(i.module)}) imports {i.target} ({room(i.target)})"
        for i in imports()[0]
        if room(i.module) != room(i.target)
        and floors()[room(i.target)] >= floors()[room(i.module)]
    ]  # fmt: skip
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for i in imports()[0]:
        if i.target != i.module:
            graph[i.module].add(i.target)
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in graph.get(module, ()):
                walk(target, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("package", OUTSIDE)
def test_other_packages_stay_in_their_rooms(package: str) -> None:
    seen = [i for i in imports()[1] if i.target.split(".")[0] == package]
    assert seen, "nothing imports it any more"
    wrong = {
        f"{i.module}:{i.line}" for i in seen
        if room(i.module) not in OUTSIDE[package] and (i.module, package) not in OUTSIDE_EXCEPTIONS
    }  # fmt: skip
    assert wrong == set()
    spare = {module for module, other in OUTSIDE_EXCEPTIONS if other == package}
    assert spare <= {i.module for i in seen}, "an exception that nothing needs"


def test_the_front_end_does_not_load_the_worker() -> None:
    wrong = set()
    assert {f"model_patches.{name}" for name in (*FRONT, *WORKER)} <= set(modules())
    for i in imports()[0]:
        (*_, mine), (*_, theirs) = i.module.split("."), i.target.split(".")
        inside = room(i.module) == room(i.target) == "model_patches"
        if inside and mine in FRONT and theirs in WORKER:
            wrong.add((mine, theirs))
    assert wrong == set()


@pytest.mark.parametrize("module", ["model_patches.register", "model_patches.check", "plugin"])
def test_what_decides_whether_to_patch_imports_no_vllm(module: str) -> None:
    """By way of others neither: an import error would be swallowed and serve plain vLLM."""
    left, seen = [module], set()
    while left:
        at = left.pop()
        if at not in seen:
            seen.add(at)
            left += [i.target for i in imports()[0] if i.module == at and i.at_once]
    others = [i for i in imports()[1] if i.module in seen and i.at_once]
    assert [i for i in others if i.target.split(".")[0] == "vllm"] == []
