"""One safetensors file, read by calls of the operating system and never mapped into memory.

A mapped file that somebody cuts short ends the process that looks at it (SIGBUS), and with a worker
the whole server. So the library sees the header alone, in front of a hole of the file's size: every
check of shapes, dtypes and offsets is its own. The tensors are then read from where it says.
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_lora_ext.adapters.files import Limits, too_large, unreadable
from vllm_lora_ext.errors import AdapterError

# As safetensors spells them.
SPELLING = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {spelling: dtype for dtype, spelling in SPELLING.items()}
_LENGTH = 8  # bytes, of the header's length


class TensorFile:
    """A safetensors file, opened and checked; `close` closes it, once.

    Args:
        path: where it really lies; name: what errors call it.
    Attributes:
        shapes, dtypes: of every tensor; dtypes as safetensors spells them.
    Raises:
        AdapterError: `bad_file`, `bad_safetensors`, `too_large`.
    """

    def __init__(self, path: Path, name: str, limits: Limits) -> None:
        self.name = name
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(name, error) from error
        self.close = weakref.finalize(self, os.close, self._file)
        try:
            self._open(limits)
        except BaseException:
            self.close()
            raise

    def _open(self, limits: Limits) -> None:
        try:
            size = os.fstat(self._file).st_size
            header = self._header(size, limits)
            self.shapes, self.dtypes = _as_the_library_reads(header, size)
            said: dict[str, Any] = json.loads(header[_LENGTH:])
        except OSError as error:
            raise unreadable(self.name, error) from error
        except (SafetensorError, RuntimeError) as error:
            raise bad_safetensors(self.name, str(error)) from error
        self._places = {key: said[key]["data_offsets"] for key in self.shapes}
        self._begin = len(header)

    def _header(self, size: int, limits: Limits) -> bytes:
        """The header and its length before it, which the file can hold and the limits allow."""
        if size < _LENGTH:
            raise bad_safetensors(self.name, f"it has {size} bytes")
        if size > limits.file_bytes:
            raise too_large(self.name, size, limits.file_bytes)
        length = int.from_bytes(os.pread(self._file, _LENGTH, 0), "little")
        if length > size - _LENGTH:
            raise bad_safetensors(self.name, f"a header of {length} bytes in a file of {size}")
        if length > limits.header_bytes:
            raise too_large(f"the header of {self.name}", length, limits.header_bytes)
        return os.pread(self._file, _LENGTH + length, 0)

    def read(self, tensor: str) -> torch.Tensor:
        """A tensor as it is stored, in memory of its own.

        Raises:
            AdapterError: `bad_safetensors`, the file has become shorter, or cannot be read.
        """
        begin, end = self._places[tensor]
        bytes_B = torch.empty(end - begin, dtype=torch.uint8)
        left, at = bytes_B.numpy().data, self._begin + begin
        while left:
            try:
                count = os.preadv(self._file, [left], at)
            except OSError as error:
                raise bad_safetensors(self.name, str(error)) from error
            if not count:
                raise bad_safetensors(self.name, "it became shorter while it was read")
            left, at = left[count:], at + count
        return bytes_B.view(_DTYPES[self.dtypes[tensor]]).view(self.shapes[tensor])


def bad_safetensors(name: str, reason: str) -> AdapterError:
    """The error for a safetensors file that is broken in any way."""
    return AdapterError(
        "bad_safetensors", f"{name} is broken or cut off: {reason}",
        fix="copy or save the file again",
    )  # fmt: skip


def _as_the_library_reads(
    header: bytes, size: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and dtypes of a file of `size` bytes that begins with `header`.

    Raises:
        SafetensorError, OSError, RuntimeError: whatever is wrong with it.
    """
    hole = os.memfd_create("lora-ext-header", os.MFD_CLOEXEC)
    try:
        with open(hole, "wb", closefd=False) as file:
            file.write(header)
        os.ftruncate(hole, size)
        opened = safe_open(f"/proc/self/fd/{hole}", framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        return shapes, {name: str(part.get_dtype()) for name, part in slices.items()}
    finally:
        os.close(hole)
