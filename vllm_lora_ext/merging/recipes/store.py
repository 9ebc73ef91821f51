"""Store: merged adapters under the hash of what they were made of, within a limit of bytes.

Any number of processes may use one store: a merge is made by the first that asks for it, a folder
appears by one rename and goes by one, and the locks are the operating system's, so that they end
with their process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_lora_ext.adapters.folder import WEIGHTS
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.merge import Progress
from vllm_lora_ext.merging.recipes.lock import LOCK, key_of, read_inputs
from vllm_lora_ext.merging.recipes.run import Locate
from vllm_lora_ext.merging.recipes.schema import Recipe
from vllm_lora_ext.merging.recipes.watch import Cancel, Watch
from vllm_lora_ext.merging.recipes.write import Built, write_recipe

_LOCKS, _POLL_S = ".locks", 0.05


class Store:
    """A folder of merged adapters.

    Args:
        root: made when it is missing.
        max_bytes: of all adapters together; those that were not used for longest go first.
    """

    def __init__(self, root: str | os.PathLike[str], max_bytes: int) -> None:
        self._root, self._max_bytes = Path(root), max_bytes

    def get_or_build(
        self,
        recipe: Recipe,
        locate: Locate,
        *,
        versions: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        max_rank: int | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Built:
        """The merged adapter, made now if nobody made it before.

        The folder stays until others need its room: who needs it longer links or copies it.

        Args: as `write_recipe`.
            versions: name → `RoutedAdapter.digest` of the adapter that is meant by it; what was
                made of it is found though its folder holds another by now.
        Raises:
            AdapterError: those of `write_recipe`; `too_large`, it does not fit into the store.
        """
        (self._root / _LOCKS).mkdir(parents=True, exist_ok=True)
        inputs = read_inputs(recipe, locate, versions)
        of_files = dtype or getattr(torch, recipe.file_dtype)
        key = key_of(recipe, inputs, str(of_files).removeprefix("torch."), max_rank)
        with self._locked(key, Watch(None, cancel)):
            self._sweep(key)
            built = self._find(key)
            if built is not None:
                return built
            built = write_recipe(
                recipe, locate, self._root / key, dtype=of_files, max_rank=max_rank,
                progress=progress, cancel=cancel, inputs=inputs,
            )  # fmt: skip
            if _size(built.path) > self._max_bytes:
                seen = _size(built.path)
                self._remove(built.path)
                raise AdapterError(
                    "too_large", "the merged adapter is larger than the store may be",
                    seen=f"{seen} bytes", limit=f"{self._max_bytes} bytes",
                    fix="lower its rank, or raise the store's limit",
                )  # fmt: skip
        self._make_room(keep=key)
        return built

    def _find(self, key: str) -> Built | None:
        folder = self._root / key
        try:
            lock = json.loads((folder / LOCK).read_bytes())
            built = Built(folder, int(lock["rank"]), dict(lock["report"]))
            if built.rank < 0:
                raise ValueError(built.rank)
            if not (folder / WEIGHTS[0]).is_file():
                raise FileNotFoundError(folder)
            os.utime(folder / LOCK)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if folder.exists():  # somebody's hand was in here
                self._remove(folder)
            return None
        return built

    def _make_room(self, keep: str) -> None:
        with self._locked("room"):
            for part in self._root.glob(".*.*"):  # of processes that were ended
                key = part.name.split(".")[1]
                with self._try_locked(key) as ours:
                    if ours:
                        shutil.rmtree(part, ignore_errors=True)
            found = [entry for path in self._root.iterdir() if (entry := _entry(path))]
            total = sum(size for _, size, _ in found)
            for _, size, folder in sorted(found):
                if total <= self._max_bytes:
                    return
                if folder.name == keep:
                    continue
                with self._try_locked(folder.name) as ours:
                    if ours:
                        self._remove(folder)
                        total -= size

    def _remove(self, folder: Path) -> None:
        """Out of sight at once; its key's lock is ours."""
        away = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=self._root)
        os.rename(folder, Path(away) / "gone")
        shutil.rmtree(away, ignore_errors=True)

    def _sweep(self, key: str) -> None:
        for part in self._root.glob(f".{key}.*"):
            shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, watch: Watch | None = None) -> Iterator[None]:
        with self._open(name) as handle:
            while not _take(handle):
                if watch:
                    watch.ask()
                time.sleep(_POLL_S)
            yield

    @contextmanager
    def _try_locked(self, name: str) -> Iterator[bool]:
        with self._open(name) as handle:
            yield _take(handle)

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        handle = os.open(self._root / _LOCKS / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield handle
        finally:
            os.close(handle)  # lets the lock go


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _entry(path: Path) -> tuple[int, int, Path] | None:
    """(last use, bytes, folder) of an adapter in the store."""
    if path.name.startswith(".") or not path.is_dir():
        return None
    try:
        return (path / LOCK).stat().st_mtime_ns, _size(path), path
    except FileNotFoundError:
        return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
