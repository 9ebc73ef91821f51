"""What a merge was made of: the hash that names it, and the file that says it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.methods import find_method
from vllm_lora_ext.merging.recipes.schema import Recipe

LOCK = "recipe.lock.json"
OP_VERSION = 2  # raised when an operation gives other numbers than before


@dataclass(frozen=True)
class Inputs:
    """The files behind a recipe's names.

    Args:
        hashes: name → path inside it (the file's own name for a single file) → sha256; of an
            adapter whose version is known: {"version": that version}.
        stats: what tells that a file has changed since.
        versions: name → `RoutedAdapter.digest` of the adapter that is meant by it.
    """

    hashes: dict[str, dict[str, str]]
    stats: dict[str, list[tuple[str, int, int, int]]] = field(repr=False)
    versions: dict[str, str]


def read_inputs(
    recipe: Recipe, locate: Callable[[str], Path], versions: Mapping[str, str] | None = None
) -> Inputs:
    """Hash every file that a recipe may read, but for those of adapters whose version is known:
    what was made of a version is found by it, whatever its folder holds by now.

    Raises:
        AdapterError: `not_found`, `bad_file`.
    """
    known = {name: (versions or {})[name] for name in recipe.inputs() if name in (versions or {})}
    hashes, stats = {}, {}
    for name in recipe.inputs():
        where = locate(name)
        stats[name] = _stats(name, where)
        if name in known:
            hashes[name] = {"version": known[name]}
        else:
            hashes[name] = {part: _sha256(path) for part, path in _files(name, where)}
    return Inputs(hashes, stats, known)


def check_versions(inputs: Inputs, locate: Callable[[str], Path]) -> None:
    """To be called before what `check_unchanged` is called after.

    Raises:
        AdapterError: `files_changed`, a folder holds another version than is meant; those of
            reading it.
    """
    for name, version in inputs.versions.items():
        seen = load_adapter(locate(name), roots=(), parts=True).digest
        if seen != version:
            raise AdapterError(
                "files_changed", f"the files of adapter {name} are another version than the one"
                " that is served, and to be merged", seen=seen, limit=version,
                fix="load it again with load_inplace to merge what is there now, or put its files"
                " back; a new version belongs into a folder of its own",
            )  # fmt: skip


def check_unchanged(inputs: Inputs, recipe: Recipe, locate: Callable[[str], Path]) -> None:
    """Raises AdapterError `files_changed`: a file is another one than when it was looked at."""
    for name in recipe.inputs():
        if _stats(name, locate(name)) != inputs.stats[name]:
            raise AdapterError(
                "files_changed", "an input of the recipe changed while it was merged", seen=name,
                fix="merge again when nobody writes to it",
            )  # fmt: skip


def key_of(recipe: Recipe, inputs: Inputs, dtype: str, max_rank: int | None) -> str:
    """The name of a result: equal for equal recipes on equal files, 64 hexadecimal digits."""
    made_of = {
        "recipe": recipe.model_dump(mode="json"), "inputs": inputs.hashes, "dtype": dtype,
        "max_rank": max_rank, "op_version": OP_VERSION,
    }  # fmt: skip
    found = {name: find_method(name).version for name in recipe.methods()}
    if versions := {name: version for name, version in found.items() if version}:
        made_of["methods"] = versions
    text = json.dumps(made_of, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def lock_file(
    recipe: Recipe, inputs: Inputs, dtype: str, max_rank: int | None, rank: int,
    report: dict[str, Any],
) -> bytes:  # fmt: skip
    """Content of `recipe.lock.json`; its `recipe` is a recipe again."""
    content = {
        "key": key_of(recipe, inputs, dtype, max_rank), "op_version": OP_VERSION,
        "recipe": recipe.model_dump(mode="json"), "inputs": inputs.hashes, "dtype": dtype,
        "max_rank": max_rank, "rank": rank, "report": report,
    }  # fmt: skip
    return (json.dumps(content, indent=2) + "\n").encode()


def _files(name: str, where: Path) -> Iterator[tuple[str, Path]]:
    """Regular files, in the order of their names; hidden ones are nobody's input."""
    if where.is_file():
        yield where.name, where
    elif where.is_dir():
        found = sorted(path for path in where.rglob("*") if path.is_file())
        for path in found:
            inside = path.relative_to(where)
            if not any(part.startswith(".") for part in inside.parts):
                yield inside.as_posix(), path
    else:
        raise AdapterError(
            "not_found", "an input of the recipe is not there", seen=name,
            fix="check its name or path",
        )  # fmt: skip


def _stats(name: str, where: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for part, path in _files(name, where):
        stat = os.stat(path)
        found.append((part, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return found


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(
            "bad_file", f"{path.name} cannot be read: {error.strerror}", fix="check its permissions"
        ) from error
