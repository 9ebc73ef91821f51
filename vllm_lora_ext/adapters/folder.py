"""AdapterFolder: the only way a reader gets at an adapter's files.

Everything is checked before memory is asked for, and everything that was handed out is
remembered, so that `finish` can refuse what nobody asked for: a tensor that a reader does not
know may be the very one that makes the adapter different from what would be served.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.adapters.paths import outside, real_file, resolve_inside
from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError

__all__ = ["AdapterFolder", "Limits", "resolve_inside"]

CONFIG, SIDECAR = "adapter_config.json", "routing.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
# Of a format that is known and refused: opened so that it can be refused by its name.
REFUSED_WEIGHTS = ("xlora_classifier.safetensors",)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FLOATS = ("F32", "F16", "BF16")
WHOLE = ("I64", "I32", "I16", "I8", "U8")


@dataclass(frozen=True)
class Limits:
    """What one adapter folder may hold.

    Args:
        json_bytes: size of one JSON file.
        header_bytes: size of the table of contents of a safetensors file.
        tensors: number of tensors, read or not.
        file_bytes: size of a safetensors file (MeteoRA's holds a whole model, mostly unread).
        read_bytes: memory for the tensors that are read, as float32.
    """

    json_bytes: int = 4 << 20
    header_bytes: int = 16 << 20
    tensors: int = 200_000
    file_bytes: int = 256 << 30
    read_bytes: int = 16 << 30


@dataclass
class _Budget:
    """What was read so far, over a folder and all its subfolders."""

    read_bytes: int = 0


class AdapterFolder:
    """An adapter's files, opened safely.

    Args:
        path: the folder.
        limits: see `Limits`.
        settings: what the files leave out, in place of or beside the sidecar `routing.json`.
    Attributes:
        names: names of all tensors in the weights file; empty when there is none.
        config: `adapter_config.json`, empty when there is none.
        no_weights: the error to raise when no format is made of subfolders only; None when there
            is a weights file.
    Raises:
        AdapterError: `not_found`, `pickle_refused`, `missing_file`, `unexpected_file`,
            `path_not_allowed`, `bad_file`, `bad_json`, `bad_safetensors`, `too_large`.
    """

    # What `take` takes; an offline tool may say otherwise.
    dtypes: tuple[str, ...] = FLOATS

    def __init__(
        self,
        path: str | os.PathLike[str],
        limits: Limits | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._open(Path(path), "", limits or Limits(), _Budget(), settings)

    def _open(
        self, root: Path, below: str, limits: Limits, budget: _Budget,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._root, self._below, self.limits, self._budget = root, below, limits, budget
        self.path = root / below
        if not os.path.isdir(self.path):
            raise AdapterError(
                "not_found", "there is no adapter folder", seen=below or str(self.path),
                fix="check the path of the adapter",
            )  # fmt: skip
        self._parts: dict[str, bytes] = {}
        self._taken: set[str] = set()
        self._settings_taken: set[str] = set()
        self._subfolders: dict[str, AdapterFolder] = {}
        self._has_config = self._real(CONFIG) is not None
        self.config: dict[str, Any] = self.json(CONFIG) if self._has_config else {}
        has_sidecar = self._real(SIDECAR) is not None
        self._sidecar: dict[str, Any] = self.json(SIDECAR) if has_sidecar else {}
        self._add_settings(settings or {})
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self.no_weights: AdapterError | None = None
        self._weights_name = self._find_weights()
        if self._weights_name:
            self._open_weights()

    def _add_settings(self, settings: Mapping[str, Any]) -> None:
        for key, value in settings.items():
            if key in self._sidecar and self._sidecar[key] != value:
                raise AdapterError(
                    "setting_mismatch", f"'{key}' is given, and {SIDECAR} says something else",
                    seen=value, limit=self._sidecar[key], fix="give it once",
                )  # fmt: skip
        if settings:
            self._sidecar = {**self._sidecar, **settings}
            text = json.dumps(dict(settings), sort_keys=True, default=str)
            self._parts["settings"] = hashlib.sha256(text.encode()).digest()

    def _real(self, name: str) -> Path | None:
        return real_file(self._root, os.path.join(self._below, name) if name else name)

    def subfolder(self, name: str) -> AdapterFolder:
        """An adapter folder inside this one; its files count as this adapter's.

        Raises:
            AdapterError: what opening a folder raises, or the name leads out of this one.
        """
        if name not in self._subfolders:
            below = os.path.join(self._below, name)
            if name in ("", ".") or os.path.isabs(name) or "\0" in name:
                raise outside(name)
            if not Path(os.path.realpath(self._root / below)).is_relative_to(
                os.path.realpath(self.path)
            ):
                raise outside(name)
            inner = object.__new__(AdapterFolder)
            inner._open(self._root, below, self.limits, self._budget)
            self._subfolders[name] = inner
        return self._subfolders[name]

    def subfolders(self) -> list[str]:
        """Names of the folders inside that hold an `adapter_config.json`, sorted."""
        found = (entry for entry in self._list() if (self.path / entry / CONFIG).is_file())
        return list(found)

    @property
    def has_config(self) -> bool:
        """Whether there is an `adapter_config.json`."""
        return self._has_config

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder. Raises AdapterError when missing, too large or broken."""
        path = self._real(name)
        if path is None:
            raise AdapterError("missing_file", f"'{name}' is missing", fix=f"add {name}")
        text = _read(path, name, self.limits.json_bytes + 1)
        if len(text) > self.limits.json_bytes:
            raise AdapterError(
                "too_large", f"{name} is too large", seen=f"over {self.limits.json_bytes} bytes",
                limit=self.limits.json_bytes, fix="remove what is no adapter setting",
            )  # fmt: skip
        self._parts[name] = hashlib.sha256(text).digest()
        return parse_object(text, name)

    def has_setting(self, key: str) -> bool:
        """Whether the sidecar `routing.json` holds `key`."""
        return key in self._sidecar

    def setting(self, key: str, meaning: str) -> Any:
        """A value of the sidecar `routing.json` that the files of this system leave out.

        Raises:
            AdapterError: `missing_setting`.
        """
        if key not in self._sidecar:
            raise AdapterError(
                "missing_setting",
                f"'{key}' ({meaning}) is in no file of this adapter",
                fix=f'add "{key}" to {SIDECAR} in the adapter\'s folder',
            )
        self._settings_taken.add(key)
        return self._sidecar[key]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name not in self._shapes:
            raise missing_tensor(name)
        return self._shapes[name]

    def take(self, name: str) -> torch.Tensor:
        """A tensor as float32, in memory of its own, marked as used.

        Raises:
            AdapterError: `missing_tensor`, `bad_dtype`, `too_large`, `bad_safetensors`,
                `not_finite`.
        """
        tensor = self._read(name, self.dtypes, "float32, float16 or bfloat16").float()
        if not is_finite(tensor):
            raise not_finite(f"tensor '{name}'", tensor)
        return tensor

    def take_whole(self, name: str) -> torch.Tensor:
        """A tensor of whole numbers (indices, seeds) as int64, marked as used.

        Raises:
            AdapterError: `missing_tensor`, `bad_dtype`, `too_large`, `bad_safetensors`.
        """
        return self._read(name, WHOLE, "int64, int32, int16, int8 or uint8").long()

    def reserve(self, values: int) -> None:
        """Count float32 values that a reader is about to make of what it took.

        Raises:
            AdapterError: `too_large`.
        """
        self._budget.read_bytes += 4 * values
        if self._budget.read_bytes > self.limits.read_bytes:
            raise AdapterError(
                "too_large", "the adapter's tensors need too much memory",
                seen=f"over {self.limits.read_bytes} bytes", limit=self.limits.read_bytes,
                fix="serve fewer experts or a smaller rank",
            )  # fmt: skip

    def _read(self, name: str, dtypes: tuple[str, ...], allowed: str) -> torch.Tensor:
        shape = self.shape(name)
        if self._dtypes[name] not in dtypes:
            raise AdapterError(
                "bad_dtype", f"tensor '{name}' has a dtype that cannot be served",
                seen=self._dtypes[name], limit=list(dtypes), fix=f"save it as {allowed}",
            )  # fmt: skip
        self.reserve(_count(shape))
        try:
            stored: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise bad_safetensors(self._weights_name, str(error)) from error
        stored = stored.clone(memory_format=torch.contiguous_format)  # it was a view of the file
        self._parts[f"tensor {name}"] = _hash(stored)
        self._taken.add(name)
        return stored

    def skip(self, names: Iterable[str]) -> None:
        """Mark tensors as known and of no use for serving (a base weight saved along)."""
        self._taken.update(names)

    def finish(self) -> str:
        """Refuse what no reader asked for; then the sha256 over all that was read.

        Raises:
            AdapterError: `unexpected_tensor`, `unknown_key`.
        """
        left = [name for name in self._shapes if name not in self._taken]
        if left:
            raise AdapterError(
                "unexpected_tensor",
                f"{len(left)} of {len(self._shapes)} tensors belong to no part of this format",
                seen=sorted(left)[:4],
                fix="check that the adapter is of the system it says, and saved completely",
            )
        unread = sorted(set(self._sidecar) - self._settings_taken)
        if unread:
            raise AdapterError(
                "unknown_key", f"{SIDECAR} holds a key that this format does not use",
                seen=unread[0], limit=sorted(self._settings_taken) or "none",
                fix=f"remove it from {SIDECAR}",
            )  # fmt: skip
        for name, inner in self._subfolders.items():
            self._parts[f"folder {name}"] = bytes.fromhex(inner.finish())
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            digest.update(hashlib.sha256(name.encode()).digest() + self._parts[name])
        return digest.hexdigest()

    def _list(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except OSError as error:
            raise AdapterError("bad_file", f"the folder cannot be listed: {error}") from error

    def _find_weights(self) -> str:
        """Name of the weights file; empty, and `no_weights` set, when there is none."""
        entries = self._list()
        found = [name for name in entries if name.endswith(".safetensors")]
        pickles = [name for name in entries if name.endswith(PICKLES)]
        if not found and pickles:
            raise AdapterError(
                "pickle_refused", "the adapter's tensors are in a pickle, which can run code",
                seen=pickles[0], limit="*.safetensors",
                fix="convert it offline with `vllm-lora-ext convert --allow-pickle`,"
                " or save it as safetensors",
            )  # fmt: skip
        if not found:
            self.no_weights = AdapterError(
                "missing_file", "the adapter has no safetensors file", limit=list(WEIGHTS),
                fix=f"save its tensors as {WEIGHTS[0]}",
            )  # fmt: skip
            return ""
        known = WEIGHTS if self._has_config else WEIGHTS + REFUSED_WEIGHTS
        if len(found) > 1 or found[0] not in known:
            raise AdapterError(
                "unexpected_file", "the adapter must have exactly one safetensors file",
                seen=found[:4], limit=list(WEIGHTS), fix="remove or rename the others",
            )  # fmt: skip
        return found[0]

    def _open_weights(self) -> None:
        name, limits = self._weights_name, self.limits
        path = self._real(name)
        if path is None:
            raise AdapterError("missing_file", f"'{name}' is missing", fix=f"save {name} again")
        _check_header(path, name, limits)
        try:
            self._file = safe_open(path, framework="pt")
            names = list(self._file.keys())
            slices = {key: self._file.get_slice(key) for key in names}
            self._shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            self._dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise bad_safetensors(name, str(error)) from error
        if len(names) > limits.tensors:
            raise AdapterError(
                "too_large", f"{name} holds too many tensors", seen=len(names),
                limit=limits.tensors, fix="check that this is an adapter",
            )  # fmt: skip


def missing_tensor(name: str, because: str = "") -> AdapterError:
    """The error for a tensor that the format demands."""
    return AdapterError(
        "missing_tensor", f"tensor '{name}' is missing{because}", fix="save the adapter again"
    )


def bad_safetensors(name: str, reason: str) -> AdapterError:
    """The error for a safetensors file that is broken in any way."""
    return AdapterError(
        "bad_safetensors", f"{name} is broken or cut off: {reason}",
        fix="copy or save the file again",
    )  # fmt: skip


def _check_header(path: Path, name: str, limits: Limits) -> None:
    """Bound what the library may allocate: it must not meet a length that the file cannot hold."""
    start = _read(path, name, 8)
    if len(start) < 8:
        raise bad_safetensors(name, f"it has {len(start)} bytes")
    size, header = path.stat().st_size, int.from_bytes(start, "little")
    if size > limits.file_bytes:
        raise AdapterError(
            "too_large", f"{name} is too large", seen=size, limit=limits.file_bytes,
            fix="check that this is an adapter",
        )  # fmt: skip
    if header > size - 8:
        raise bad_safetensors(name, f"a header of {header} bytes in a file of {size}")
    if header > limits.header_bytes:
        raise AdapterError(
            "too_large", f"the header of {name} is too large", seen=header,
            limit=limits.header_bytes, fix="check that this is an adapter",
        )  # fmt: skip


def _read(path: Path, name: str, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise AdapterError(
            "bad_file", f"'{name}' cannot be read: {error.strerror}", fix="check its permissions"
        ) from error


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _hash(tensor: torch.Tensor) -> bytes:
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    size = tensor.numel() * tensor.element_size()
    data = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    return hashlib.sha256(head + hashlib.sha256(data).digest()).digest()
