"""What a mix is made of: registered adapters, recipes and libraries; never a path in a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from vllm_lora_ext.adapters.paths import resolve_inside
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.generate.sg_lora import EMBEDDINGS, LIBRARY
from vllm_lora_ext.serving.mix_name import Mix
from vllm_lora_ext.serving.operations import DESCRIBE, RECIPE
from vllm_lora_ext.settings import MergeSettings

if TYPE_CHECKING:
    from vllm_lora_ext.merging.recipes import Recipe


Known: TypeAlias = Mapping[str, tuple[str, str]]
"""Name → path and digest of the content; see `service.Host`."""


class Adapters(Protocol):
    """The adapters that a server knows by name; see `service.Host`."""

    def adapters(self) -> Known: ...

    def folder(self, path: str) -> Path: ...


@dataclass(frozen=True)
class Job:
    """One merge.

    Args:
        version: equal as long as the result is.
        request: what `build.run` needs, as JSON; may block.
    """

    version: object
    request: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class _Input:
    """An adapter of a merge: its folder, known at once or when the host has looked for it.

    Args:
        digest: what its content must be, of one that is loaded: its folder may hold another by now.
    """

    version: object
    folder: Callable[[], Path]
    digest: str = ""


class Sources:
    """Finds what a mix names."""

    def __init__(
        self, settings: MergeSettings, roots: Sequence[Path] | None, known: Adapters
    ) -> None:
        self._settings, self._roots, self._known = settings, roots, known

    def job_of(self, mix: Mix) -> Job:
        """The merge behind a name. Raises AdapterError `not_found`, those of a recipe's file."""
        if mix.op == RECIPE:
            path = self._settings.recipes.get(mix.argument)
            if path is None:
                raise AdapterError(
                    "not_found", "there is no recipe of this name", seen=mix.argument,
                    fix="name it under merge.recipes",
                )  # fmt: skip
            return self._job_of_recipe(path, mix.argument, self._known.adapters())
        if mix.op == DESCRIBE:
            return self._job_of_description(mix.argument)
        known = self._known.adapters()
        inputs = {name: self._named(name, known) for name, _ in mix.terms}
        for name, found in inputs.items():
            if found is None:
                raise AdapterError(
                    "not_found", "there is no adapter of this name to merge", seen=name,
                    fix="register it: --lora-modules, the load route, or merge.adapters",
                )  # fmt: skip
        return _job(_recipe_of(mix), {name: found for name, found in inputs.items() if found})

    def job_of_file(self, path: str, known: Known) -> Job:
        """The merge in a recipe's file; may run in any thread.

        Args:
            known: the host's adapters, which change on its event loop alone.
        Raises:
            AdapterError: those of paths and of recipes.
        """
        place = Path(os.path.expanduser(path)).absolute()
        if self._roots is not None:
            place = resolve_inside(os.path.expanduser(path), self._roots, path)
        return self._job_of_recipe(place, path, known)

    def _job_of_recipe(self, path: Path, sent: str, known: Known) -> Job:
        version = _stat(path)
        if version is None:
            raise AdapterError("not_found", "there is no such recipe", seen=sent)
        recipe = _read(path, version)
        inputs = {
            name: self._named(name, known) or self._below(name, path) for name in recipe.inputs()
        }
        return _job(recipe.model_dump(mode="json"), inputs)

    def _job_of_description(self, text: str) -> Job:
        described = self._settings.describe
        if described is None:
            raise AdapterError(
                "not_found", "this server makes no adapters from descriptions",
                fix="name a library under merge.describe",
            )  # fmt: skip
        version = [_stat(described.library / name) for name in (LIBRARY, EMBEDDINGS)]
        request = {"describe": {**described.model_dump(mode="json"), "text": text}}
        return Job(version, lambda: request)

    def _named(self, name: str, known: Known) -> _Input | None:
        if name in known:
            place, digest = known[name]
            return _Input(known[name], partial(self._known.folder, place), digest)
        path = self._settings.adapters.get(name)
        return None if path is None else _Input(_stats(path), lambda: path)

    def _below(self, name: str, recipe: Path) -> _Input:
        """A recipe's file may name folders and files (masks, latents), from its own folder on."""
        path = Path(os.path.abspath(recipe.parent / os.path.expanduser(name)))
        if self._roots is not None:
            path = resolve_inside(path, self._roots, name)
        if not os.path.isdir(path) and not os.path.isfile(path):  # whatever the name is
            raise AdapterError(
                "not_found", "an input of the recipe is neither registered nor a folder or file",
                seen=name, fix="check the name, or the path from the recipe's own folder on",
            )  # fmt: skip
        return _Input(_stats(path), lambda: path)


def _recipe_of(mix: Mix) -> dict[str, Any]:
    options = dict(mix.options)
    output = {key: options.pop(key) for key in ("rank", "energy") if key in options}
    models = [{"model": name, "parameters": {"weight": weight / 100}} for name, weight in mix.terms]
    found = {"version": 1, "merge_method": mix.op, "models": models, "parameters": options}
    return {**found, "output": output} if output else found


def _job(recipe: dict[str, Any], inputs: Mapping[str, _Input]) -> Job:
    version = (repr(recipe), [(name, found.version) for name, found in inputs.items()])

    def request() -> dict[str, Any]:
        folders = {name: str(found.folder()) for name, found in inputs.items()}
        versions = {name: found.digest for name, found in inputs.items() if found.digest}
        return {"recipe": recipe, "folders": folders, "versions": versions}

    return Job(version, request)


@lru_cache(maxsize=64)
def _read(path: Path, version: object) -> Recipe:
    # A server without recipes starts without their parser.
    from vllm_lora_ext.merging.recipes import read_recipe

    return read_recipe(path)


def _stat(path: Path) -> tuple[str, int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # there is none, or no file can have this name
        return None
    return path.name, found.st_size, found.st_mtime_ns, found.st_ino


def _stats(path: Path) -> list[object]:
    """Of the files of an adapter that the engine does not hold: another file, another mix.

    Raises:
        AdapterError: `bad_file`, its folder cannot be looked into.
    """
    try:
        found = [*path.iterdir()] if path.is_dir() else [path]
    except OSError as error:
        raise AdapterError(
            "bad_file", f"an adapter of the mix cannot be read: {error.strerror}", seen=path.name,
            fix="check its folder's permissions",
        ) from error  # fmt: skip
    return [*sorted(filter(None, map(_stat, found)))]
