"""Folders that appear whole or not at all: filled beside their place, put there by one rename."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_lora_ext.adapters.folder import WEIGHTS
from vllm_lora_ext.errors import AdapterError

Ours = Callable[[Path], bool]


def nothing(place: Path) -> bool:
    """Only an empty folder may be replaced."""
    return not any(place.iterdir())


def check_place(place: Path, ours: Ours = nothing, aside: bool = False) -> None:
    """Refuse a place that holds what must stay there, before the work rather than after it.

    Args:
        ours: whether the folder that is there may be replaced.
        aside: what may not, is put aside by `new_folder`.
    Raises:
        AdapterError: `output_exists`.
    """
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir():
        raise AdapterError(
            "output_exists", "something that is no folder is where the output should go",
            seen=str(place), limit="a new or empty folder", fix="name another folder",
        )  # fmt: skip
    if not (ours(place) or aside):
        raise AdapterError(
            "output_exists", f"the output folder {place} holds something already",
            seen=sorted(os.listdir(place))[:4], limit="a new or empty folder",
            fix="choose another folder, empty it, or give --force where a command has it",
        )  # fmt: skip


@contextmanager
def new_folder(place: Path, ours: Ours = nothing, aside: bool = False) -> Iterator[Path]:
    """An empty folder beside `place`, which takes its place when the `with` block ends well.

    Args:
        ours, aside: as in `check_place`; what is put aside is then called `place.old`.
    Raises:
        AdapterError: `output_exists`; `output_failed`, the block or what follows raised an
            OSError. `place` is then as it was, as it is after any other error.
    """
    check_place(place, ours, aside)
    try:
        with beside(place) as scratch:
            made = scratch / "new"
            made.mkdir()
            yield made
            for path in (*made.rglob("*"), made):
                _sync(path)
            _put(made, place, scratch, ours)
        _sync(place.parent)
    except OSError as error:
        raise AdapterError(
            "output_failed", f"the folder {place} cannot be written: {error}",
            fix="check the folder's permissions and the space left",
        ) from error  # fmt: skip


@contextmanager
def beside(place: Path) -> Iterator[Path]:
    """A folder on the same disk as `place`, there for the `with` block only.

    Its lock says that its process lives; what ended processes left of `place` goes.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    part, ours = _claim(place)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(ours)  # lets the lock go


def fill(
    folder: Path, tensors: Mapping[str, torch.Tensor], files: Mapping[str, bytes | str]
) -> None:
    """An adapter's files into a folder of `new_folder`.

    Raises:
        OSError: they cannot be written.
    """
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    try:
        save_file(dict(tensors), folder / WEIGHTS[0], metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors writes for the owner only; a server may run as somebody else.
    (folder / WEIGHTS[0]).chmod(folder.stat().st_mode & 0o666)


def _put(made: Path, place: Path, scratch: Path, ours: Ours) -> None:
    if not place.exists():
        os.rename(made, place)
        return
    earlier = scratch / "earlier" if ours(place) else _free_name(place)
    os.rename(place, earlier)
    try:
        os.rename(made, place)
    except OSError:
        os.rename(earlier, place)
        raise


def _free_name(place: Path) -> Path:
    number = 1
    while True:
        name = f"{place.name}.old" + (str(number) if number > 1 else "")
        if not os.path.lexists(place.with_name(name)):
            return place.with_name(name)
        number += 1


def _claim(place: Path) -> tuple[Path, int]:
    """A folder beside the place, and the lock that says that its process lives."""
    while True:
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=place.parent))
        handle = os.open(part, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if part.exists():
            return part, handle
        os.close(handle)  # swept before it was locked


def _sweep(place: Path) -> None:
    """Away with what ended processes left: nobody holds its lock any more."""
    for part in place.parent.glob(f".{glob.escape(place.name)}.part-*"):
        try:
            handle = os.open(part, os.O_RDONLY)
        except OSError:  # gone meanwhile
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
