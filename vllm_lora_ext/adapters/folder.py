"""AdapterFolder: the only way a reader gets at an adapter's files.

Everything is checked before memory is asked for, and everything that was handed out is
remembered, so that `finish` can refuse what nobody asked for: a tensor that a reader does not
know may be the very one that makes the adapter different from what would be served.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters.files import Limits, read_object
from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.adapters.paths import check_inside, outside, real_file, resolve_inside, shown
from vllm_lora_ext.adapters.pickles import PICKLES
from vllm_lora_ext.adapters.stamps import Stamps
from vllm_lora_ext.adapters.tensor_file import bad_safetensors
from vllm_lora_ext.adapters.weights import (
    FLOATS,
    WEIGHTS,
    WHOLE,
    missing_tensor,
    open_weights,
)
from vllm_lora_ext.errors import AdapterError

__all__ = [
    "CONFIG", "FLOATS", "PICKLES", "SIDECAR", "WEIGHTS", "WHOLE", "AdapterFolder", "Limits",
    "bad_safetensors", "missing_tensor", "resolve_inside",
]  # fmt: skip

CONFIG, SIDECAR = "adapter_config.json", "routing.json"
Roots = Sequence[str | os.PathLike[str]]


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
        roots: folders that links out of the adapter's folder may lead into; None: anywhere.
        allow_pickle: whether `adapter_model.bin` may take the place of safetensors.
        accepted: config keys that nobody knows and that are let through.
        head_size: rows per attention head of the model that is to serve it; None: not known.
    Attributes:
        names: names of all tensors in the weights; empty when there are none.
        config: `adapter_config.json`, empty when there is none.
        no_weights: the error to raise when no format is made of subfolders only; None when there
            are weights.
    Raises:
        AdapterError: `not_found`, `path_not_allowed`, `bad_file`, `bad_json`, `too_large`, and
            those of `open_weights`.
    """

    # What `take` takes; an offline tool may say otherwise.
    dtypes: tuple[str, ...] = FLOATS

    def __init__(
        self,
        path: str | os.PathLike[str],
        limits: Limits | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        roots: Roots | None = None,
        allow_pickle: bool = False,
        accepted: Collection[str] = (),
        head_size: int | None = None,
    ) -> None:
        self._root, self.limits, self._budget = Path(path), limits or Limits(), _Budget()
        self._stamps = Stamps()  # of all subfolders too
        self._roots, self._allow_pickle, self.accepted = roots, allow_pickle, frozenset(accepted)
        self.head_size = head_size
        with self.unchanged():
            self._open("", settings or {})

    def _open(self, below: str, settings: Mapping[str, Any]) -> None:
        self._below = below
        self.path = self._root / below
        if not os.path.isdir(self.path):
            raise AdapterError(
                "not_found", "there is no adapter folder", seen=below or shown(self.path),
                fix="check the path of the adapter",
            )  # fmt: skip
        self._parts: dict[str, bytes] = {}
        self._taken: set[str] = set()
        self._settings_taken: set[str] = set()
        self._subfolders: dict[str, AdapterFolder] = {}
        self._has_config = self._real(CONFIG) is not None
        self.config: dict[str, Any] = self.json(CONFIG) if self._has_config else {}
        if self._has_config and self.config.get("peft_type") is None:
            self.config["peft_type"] = "LORA"  # as vLLM takes it; the tensors' names must agree
        has_sidecar = self._real(SIDECAR) is not None
        self._sidecar: dict[str, Any] = self.json(SIDECAR) if has_sidecar else {}
        self._add_settings(settings)
        self._weights = open_weights(
            self._list(), self._real, self.limits,
            has_config=self._has_config, allow_pickle=self._allow_pickle,
        )  # fmt: skip
        self.no_weights: AdapterError | None = self._weights.missing

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

    def close(self) -> None:
        """Closes its files; nothing is read any more."""
        self._weights.close()
        for inner in self._subfolders.values():
            inner.close()

    def _real(self, name: str) -> Path | None:
        below = os.path.join(self._below, name) if name else name
        found = real_file(self._root, below, self._roots)
        if found is not None:
            self._stamps.note(found, below, self._root / below)
        return found

    def subfolder(self, name: str) -> AdapterFolder:
        """An adapter folder inside this one; its files count as this adapter's.

        Raises:
            AdapterError: what opening a folder raises, or the name leads out of this one.
        """
        if name not in self._subfolders:
            below = os.path.join(self._below, name)
            if name in ("", "."):
                raise outside(name)
            check_inside(self._root, below, self._roots)
            inner = copy.copy(self)  # the same root, limits and budget
            inner._open(below, {})
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
        return list(self._weights.shapes)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder. Raises AdapterError when missing, too large or broken."""
        path = self._real(name)
        if path is None:
            raise AdapterError("missing_file", f"'{name}' is missing", fix=f"add {name}")
        found, self._parts[name] = read_object(path, name, self.limits)
        return found

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
        if name not in self._weights.shapes:
            raise missing_tensor(name)
        return self._weights.shapes[name]

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
        dtype = self._weights.dtypes[name]
        if dtype not in dtypes:
            raise AdapterError(
                "bad_dtype", f"tensor '{name}' has a dtype that cannot be served", seen=dtype,
                limit=list(dtypes), fix=f"save it as {allowed}",
            )  # fmt: skip
        self.reserve(math.prod(shape))
        stored = self._weights.read(name)
        self._parts[f"tensor {name}"] = tensor_digest(stored)
        self._taken.add(name)
        return stored

    def skip(self, names: Iterable[str]) -> None:
        """Mark tensors as known and of no use for serving (a base weight saved along)."""
        self._taken.update(names)

    def read_tensors(self) -> list[str]:
        """Names of the tensors that were read, and not skipped."""
        return [name for name in self.names if f"tensor {name}" in self._parts]

    def settings(self) -> dict[str, Any]:
        """All that the sidecar says, and what was given in its place."""
        return dict(self._sidecar)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What breaks a rule within was not of two versions, or the error is `files_changed`."""
        try:
            yield
        except AdapterError:
            self._stamps.check()
            raise

    def finish(self) -> str:
        """Refuse what no reader asked for; then the sha256 over all that was read.

        Raises:
            AdapterError: `unexpected_tensor`, `unknown_key`; `files_changed`, somebody wrote to
                them meanwhile.
        """
        self._stamps.check()
        left = [name for name in self.names if name not in self._taken]
        if left:
            raise AdapterError(
                "unexpected_tensor",
                f"{len(left)} of {len(self.names)} tensors belong to no part of this format",
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


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """sha256 over dtype, shape and bytes of a contiguous tensor on the CPU."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    size = tensor.numel() * tensor.element_size()
    data = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    return hashlib.sha256(head + hashlib.sha256(data).digest()).digest()
