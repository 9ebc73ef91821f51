"""Files that are no adapter folders: checkpoints, index files, pickles. Offline tools only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_lora_ext.adapters.folder import (
    CONFIG,
    FLOATS,
    PICKLES,
    WEIGHTS,
    WHOLE,
    AdapterFolder,
    bad_safetensors,
    missing_tensor,
)
from vllm_lora_ext.adapters.paths import real_file
from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError

INDEX = "model.safetensors.index.json"


class Artefact(AdapterFolder):
    """An adapter folder whose numbers may be of any dtype, and which can hide tensors."""

    dtypes = (*FLOATS, *WHOLE, "BOOL")
    _hidden: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        return [name for name in super().names if name not in self._hidden]

    def hide(self, names: Iterable[str]) -> None:
        """Leave tensors out of `names`, for a reader that knows only the rest."""
        self._hidden = self._hidden | frozenset(names)


class Checkpoint:
    """Tensors of a model: a safetensors file, or a folder of them, read one at a time.

    Args:
        path: the file or folder.
        allow_pickle: also take `.bin`, `.pt` and `.pth`, read with `weights_only`.
    Attributes:
        names: names of all tensors.
    Raises:
        AdapterError: `not_found`, `missing_file`, `pickle_refused`, `bad_safetensors`, `bad_json`,
            `path_not_allowed`.
    """

    def __init__(self, path: str | os.PathLike[str], allow_pickle: bool = False) -> None:
        self.path = Path(path)
        self._loaded: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, Any] = {}
        for file in self._files(allow_pickle):
            if file.suffix == ".safetensors":
                self._open(file)
            else:
                self._loaded.update(load_pickle(file))
        self.names = [*self._file_of, *self._loaded]

    def _files(self, allow_pickle: bool) -> list[Path]:
        path = self.path
        if path.is_file():
            found = [path]
        elif not path.is_dir():
            raise AdapterError(
                "not_found", "there is no checkpoint", seen=str(path), fix="check its path"
            )
        elif (index := real_file(path, INDEX)) is not None:
            parts = parse_object(index.read_bytes(), INDEX).get("weight_map") or {}
            if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
                raise AdapterError(
                    "bad_value", f"weight_map of {INDEX} is wrong", limit="tensor to file name",
                    fix="copy the checkpoint completely",
                )  # fmt: skip
            inside = [(name, real_file(path, name)) for name in sorted(set(parts.values()))]
            gone = [name for name, file in inside if file is None]
            if gone or not inside:
                raise AdapterError(
                    "missing_file", f"{INDEX} names files that are not there", seen=gone[:3],
                    fix="copy the checkpoint completely",
                )  # fmt: skip
            found = [file for _, file in inside if file is not None]
        else:
            entries = sorted(path.iterdir())
            found = [entry for entry in entries if entry.suffix == ".safetensors"]
            found = found or [entry for entry in entries if entry.suffix in PICKLES]
        pickles = [file.name for file in found if file.suffix in PICKLES]
        if pickles and not allow_pickle:
            raise AdapterError(
                "pickle_refused", "the checkpoint is a pickle, which can run code",
                seen=pickles[0], limit="*.safetensors",
                fix="save it as safetensors, or allow pickles (weights only)",
            )  # fmt: skip
        if not found:
            raise AdapterError(
                "missing_file", "there is no safetensors file", seen=str(path),
                limit="*.safetensors", fix="check the path",
            )  # fmt: skip
        return found

    def _open(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
            self._file_of.update(dict.fromkeys(opened.keys(), opened))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise bad_safetensors(file.name, str(error)) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, unread. Raises AdapterError `missing_tensor`."""
        if name in self._loaded:
            return tuple(self._loaded[name].shape)
        if name not in self._file_of:
            raise missing_tensor(name, f" in {self.path}")
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def take(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype. Raises AdapterError `missing_tensor`, `bad_safetensors`."""
        if name in self._loaded:
            return self._loaded[name]
        if name not in self._file_of:
            raise missing_tensor(name, f" in {self.path}")
        try:
            tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise bad_safetensors(name, str(error)) from error
        return tensor.clone()

    def weight(self, module: str) -> torch.Tensor:
        """[out, in] fp32, the weight of a linear layer.

        Raises:
            AdapterError: `missing_tensor`; `bad_dtype`, a quantised weight; `bad_shape`.
        """
        name = f"{module}.weight"
        tensor = self.take(name)
        if not tensor.is_floating_point():
            raise AdapterError(
                "bad_dtype", f"'{name}' is quantised", seen=str(tensor.dtype),
                limit="float32, float16, bfloat16", fix="give the unquantised base model",
            )  # fmt: skip
        if tensor.ndim != 2:
            raise AdapterError(
                "bad_shape", f"'{name}' is no matrix", seen=list(tensor.shape), limit="[out, in]"
            )
        return tensor.float()

    def sizes(self) -> dict[str, list[int]]:
        """Layer → [in, out] of everything that looks like a linear layer."""
        found = {}
        for name in self.names:
            if name.endswith(".weight") and len(shape := self.shape(name)) == 2:
                found[name.removesuffix(".weight")] = [shape[1], shape[0]]
        return found


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled dictionary, by torch's reader that runs no code.

    Raises:
        AdapterError: `pickle_refused`, it holds more than tensors in dictionaries.
    """
    found = load_reference(file, allow_pickle=True)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise AdapterError(
            "pickle_refused", f"{file.name} is no dictionary of tensors", seen=sorted(found)[:3],
            fix="save its tensors as safetensors",
        )  # fmt: skip
    return tensors


def load_reference(file: Path, allow_pickle: bool) -> dict[str, Any]:
    """A pickled dictionary of tensors, numbers and lists, by torch's weights-only reader.

    Raises:
        AdapterError: `pickle_refused`, `missing_file`.
    """
    if not file.is_file():
        raise AdapterError("missing_file", "there is no such file", seen=str(file))
    if not allow_pickle:
        raise AdapterError(
            "pickle_refused", "the file is a pickle, which can run code", seen=file.name,
            limit="*.safetensors, *.json", fix="save it so, or allow pickles (weights only)",
        )  # fmt: skip
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        raise AdapterError(
            "pickle_refused", f"{file.name} holds more than tensors, and reading it could run code",
            fix="save its tensors as safetensors with the program that made it",
        ) from error  # fmt: skip
    if not isinstance(found, dict):
        raise AdapterError(
            "pickle_refused", f"{file.name} is no dictionary", seen=type(found).__name__,
            fix="save its tensors as safetensors",
        )  # fmt: skip
    return found


@contextmanager
def as_folder(path: str | os.PathLike[str], allow_pickle: bool) -> Iterator[Path]:
    """An adapter folder for what is at `path`: itself, or a temporary copy in safetensors.

    A single safetensors file becomes a folder without config; pickles become safetensors.

    Raises:
        AdapterError: those of `load_pickle`, `not_found`.
    """
    path = Path(path)
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    pickles = [entry for entry in entries if entry.suffix in PICKLES]
    plain = any(entry.suffix == ".safetensors" for entry in entries)
    if path.is_dir() and (plain or not pickles or not allow_pickle):
        yield path
        return
    if not path.exists():
        raise AdapterError("not_found", "there is no such file", seen=str(path))
    if pickles and not allow_pickle:
        raise AdapterError(
            "pickle_refused", "the adapter's tensors are in a pickle, which can run code",
            seen=pickles[0].name, limit="*.safetensors", fix="save it as safetensors",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lora_ext_") as made:
        folder = Path(made)
        if plain:
            _link_or_copy(path, folder / WEIGHTS[0])
        else:
            tensors: dict[str, torch.Tensor] = {}
            for file in pickles:
                tensors.update(load_pickle(file))
            save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / WEIGHTS[0])
        for name in (CONFIG, "routing.json"):
            if path.is_dir() and (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        yield folder


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that may be large; symbolic links out of a folder are refused."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
