"""Bytes of a file, never more than was allowed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class Limits:
    """What one adapter folder may hold.

    Args:
        json_bytes: size of one JSON file.
        header_bytes: size of the table of contents of a safetensors file.
        tensors: number of tensors, read or not.
        file_bytes: size of a weights file (MeteoRA's holds a whole model, mostly unread).
        read_bytes: memory for the tensors that are read, as float32.
    """

    json_bytes: int = 4 << 20
    header_bytes: int = 16 << 20
    tensors: int = 200_000
    file_bytes: int = 256 << 30
    read_bytes: int = 16 << 30


def read_start(path: Path, name: str, size: int) -> bytes:
    """The first `size` bytes. Raises AdapterError `bad_file`."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: OSError) -> AdapterError:
    """The error for a file that the system does not give."""
    return AdapterError(
        "bad_file", f"'{name}' cannot be read: {error.strerror}", fix="check its permissions"
    )


def read_object(path: Path, name: str, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """The JSON object in a file, and the sha256 of its bytes.

    Raises:
        AdapterError: `bad_file`, `bad_json`, `too_large`.
    """
    text = read_start(path, name, limits.json_bytes + 1)
    if len(text) > limits.json_bytes:
        raise too_large(name, f"over {limits.json_bytes} bytes", limits.json_bytes)
    return parse_object(text, name), hashlib.sha256(text).digest()


def too_large(what: str, seen: object, limit: int) -> AdapterError:
    """The error for a file, or a part of one, beyond its limit."""
    return AdapterError(
        "too_large", f"{what} is too large", seen=seen, limit=limit,
        fix="check that this is an adapter",
    )  # fmt: skip
