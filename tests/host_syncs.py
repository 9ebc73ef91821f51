"""A test double for a GPU's host: counts what would make it wait for the device.

Tensors on `meta` stand for those of the device, and memory asked for with `pin_memory=True` for
page-locked memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The host has to know what is in them, or how many there are.
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_static, aten.masked_select, aten.equal,
    aten.is_nonzero, aten.unique_dim, aten._unique, aten._unique2, aten.unique_consecutive,
    aten.repeat_interleave,
}  # fmt: skip
MAKES = {torch.tensor, torch.as_tensor, torch.asarray}


class HostSyncs(TorchDispatchMode):
    """Inside, `seen` gets a line for each operation that waits, and for each pageable copy.

    Args:
        page_locked: the memory that is, by its address.
    """

    def __init__(self, page_locked: set[int]) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._page_locked = page_locked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.is_meta for t in tensors)
        if on_device and packet in READS:
            self.seen.append(f"{func}: the host reads what the device holds")
            return _anything(packet, tensors[0])
        if on_device and packet in (aten.index, aten.index_put_, aten.index_put):
            for index in [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]:
                if index.dtype in (torch.bool, torch.uint8):
                    self.seen.append(f"{func}: a mask, whose numbers the host has to count")
                elif index.is_cpu and index.dim():
                    self.seen.append(f"{func}: rows that stand in the host's memory")
        if packet == aten.copy_:
            self._copy(
                func, args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2])
            )
        elif packet == aten._to_copy and "device" in kwargs:
            to = torch.empty(0, device=kwargs["device"])
            self._copy(func, to, args[0], kwargs.get("non_blocking", False))
        if packet == aten._to_copy and args[0].is_meta and _is_cpu(kwargs.get("device")):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if packet == aten.copy_ and args[1].is_meta and args[0].is_cpu:
            return args[0]
        return func(*args, **kwargs)

    def _copy(self, func: Any, to: torch.Tensor, of: torch.Tensor, asynchronous: bool) -> None:
        if of.is_meta and to.is_cpu:
            self.seen.append(f"{func}: from the device, {list(of.shape)}")
        elif of.is_cpu and to.is_meta and of.numel():
            # A number is an argument of the kernel that writes it.
            locked = of.untyped_storage().data_ptr() in self._page_locked
            if of.dim() and not (locked and asynchronous):
                kind = "blocking" if locked else "pageable"
                self.seen.append(f"{func}: {kind} copy of {list(of.shape)} {of.dtype}")


class _Makes(TorchFunctionMode):
    """`torch.tensor` and its like copy what the host holds, and hide it from other modes."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in MAKES and device is not None and torch.device(device).type == "meta":
            self._seen.append(f"torch.{func.__name__}: pageable copy")
        return func(*args, **kwargs)


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _anything(packet: Any, of: torch.Tensor) -> Any:
    if packet == aten._local_scalar_dense:
        return of.new_zeros((), device="cpu").item()
    if packet in (aten.equal, aten.is_nonzero):
        return False
    return of.new_empty(1, *of.shape[1:])


@pytest.fixture
def page_locked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Has `pin_memory=True` work without a GPU; the addresses of what was asked for."""
    known: set[int] = set()
    kept: list[torch.Tensor] = []  # so that no address is used again
    plain = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        new = plain(*args, **kwargs)
        if pin_memory:
            known.add(new.untyped_storage().data_ptr())
            kept.append(new)
        return new

    monkeypatch.setattr(torch, "empty", empty)
    return known


@contextmanager
def host_syncs(page_locked: set[int]) -> Iterator[list[str]]:
    """Gives the list of what makes the host wait inside."""
    mode = HostSyncs(page_locked)
    with _Makes(mode.seen), mode:
        yield mode.seen
