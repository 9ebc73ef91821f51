"""What a step may do to put adapters into slots: copies, and nothing that waits, reads or casts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Steps:
    """Counts what a step does to tensors, and ends it at anything but a copy into a slot.

    Args:
        strided: whether slots may hold an adapter in pieces, as those of stock's layers do; what is
            copied is one piece of memory in any case, or a GPU's host would copy it first.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, strided: bool = False) -> None:
        self._patch, self._strided = monkeypatch, strided
        self.copies = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        copy_ = torch.Tensor.copy_

        def counted(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> Any:
            assert non_blocking, "the host would wait"
            assert src.dtype == dst.dtype, "a cast"
            assert src.is_contiguous(), "not one piece of memory"
            assert self._strided or dst.is_contiguous(), "a slot in pieces"
            self.copies += 1
            return copy_(dst, src, non_blocking=True)

        def forbidden(*_: Any, **__: Any) -> Any:
            raise AssertionError("no step does this")

        with self._patch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", counted)
            for name in ("to", "float", "half", "bfloat16", "clone", "contiguous", "item", "cpu"):
                patch.setattr(torch.Tensor, name, forbidden)
            for name in ("cat", "stack", "zeros", "empty"):
                patch.setattr(torch, name, forbidden)
            for name in ("open", "os.open", "os.stat", "os.listdir", "hashlib.sha256"):
                patch.setattr(f"builtins.{name}" if name == "open" else name, forbidden)
            yield


def onto_device(layers: Iterable[torch.nn.Module]) -> None:
    """Moves the slots of stock's layers, and what stands beside them, to `meta`, which stands for a
    device (`tests.host_syncs`)."""
    for layer in layers:
        beside = getattr(layer, "factors", None)
        for owner in (layer, beside) if beside else (layer,):
            for name, value in list(vars(owner).items()):
                if isinstance(value, torch.Tensor):
                    setattr(owner, name, value.to("meta"))
                elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
                    setattr(owner, name, tuple(t.to("meta") for t in value))
