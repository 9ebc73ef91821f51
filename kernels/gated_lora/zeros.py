"""Buffers of slots."""

from __future__ import annotations

import math
import mmap

import torch


def slot_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Zeros.

    On a CPU, where a slot may be an adapter's host copy and its buffers stay empty, they take no
    memory before somebody writes: `torch.zeros` would write all of them.

    Raises:
        RuntimeError, OSError: there is no room.
    """
    count = math.prod(shape)
    if torch.device(device).type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
