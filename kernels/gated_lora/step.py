"""StepMap: which slot each row of the batch uses, and the numbers that come with it. Written once a
step, read by every site."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.backends.native import inductor

_numbers = itertools.count(1)
TILE_ROWS = (16, 64)  # rows of a tile: of a decode step, and of a prefill
MAX_COLUMNS = 64  # numbers that may come with a row, where a step has no more `columns`


class Group(NamedTuple):
    """The rows of one slot: `start:stop` when they lie together, else `index_T`."""

    slot: int
    start: int
    stop: int
    index_T: torch.Tensor | None


class StepMap:
    """The batch's rows by slot.

    Ops look the map up when they *run*, never when they are traced, so a compiled graph or a
    captured one follows the mapping of the step it runs in.

    GPU kernels read it as tiles: up to `TILE_ROWS[i]` rows of one slot. Tile j of size i has the
    rows `order_T[start[j] : stop[j]]`; slot -1 marks where the tiles end. A graph captured for T
    rows launches `max_tiles(T, slots, rows)` tiles, whatever the step holds.

    Args:
        max_tokens: most rows a step may hold.
        device: where the tables live; their addresses never change.
        tiled: whether to keep the tiles, by default on anything but a CPU.
    Attributes:
        columns: numbers that may come with a row; to be set before `rows_TC` is first asked for.
        frozen: what a graph that is being captured holds for whatever steps it will serve: True,
            that gates read sums over ranks; False, that none does. None: no graph is captured, the
            step itself says (`sharded`).
    """

    def __init__(
        self, max_tokens: int, device: torch.device | str = "cpu", tiled: bool | None = None
    ) -> None:
        self.device = torch.device(device)
        self.tiled = self.device.type != "cpu" if tiled is None else tiled
        rows = 2 + 3 * len(TILE_ROWS) if self.tiled else 1
        self.table = torch.full((rows, max_tokens), -1, dtype=torch.int32, device=device)
        self.token_slots_T = self.table[0]
        self.active_1 = np.zeros(1, dtype=np.int64)  # read by C++ at this address
        self._number = next(_numbers)
        weakref.finalize(self, inductor.set_active, self._number, False)
        self.columns = MAX_COLUMNS
        self.frozen: bool | None = None
        self._width = 0
        self._slots_T = np.empty(0, dtype=np.int64)
        self._slots: frozenset[int] | None = frozenset()
        self._groups: list[Group] | None = []

    def update(self, slots_T: np.ndarray) -> None:
        """Takes the slot of every row (int, [T]; -1: base model). Rows past T count as base.

        One copy to the device and no wait: the host runs ahead of the device, so each step's
        numbers lie in a pinned block of their own, which the allocator takes back in time.
        """
        self._slots_T, self._slots, self._groups = slots_T, None, None
        self.frozen = None
        self.active_1[0] = (slots_T >= 0).any()
        inductor.set_active(self._number, self.active)
        # As wide as the last step, so that nothing of it is left behind.
        width = max(len(slots_T), self._width)
        self._width = len(slots_T)
        pinned = self.device.type == "cuda"
        host = torch.empty(len(self.table), width, dtype=torch.int32, pin_memory=pinned)
        host_np = host.numpy()
        host_np.fill(-1)
        host_np[0, : len(slots_T)] = slots_T
        if self.tiled and self.active:
            _tile(host_np[1:], slots_T)
        self.table[:, :width].copy_(host, non_blocking=pinned)

    @cached_property
    def rows_TC(self) -> torch.Tensor:
        """[max_tokens, columns] fp32, the numbers that come with each row; its address never
        changes. Made when it is first asked for: where graphs are captured, before that."""
        shape = self.table.shape[1], self.columns
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def set_rows(self, values_TC: np.ndarray, rows: Sequence[slice]) -> None:
        """Gives some rows of the step their numbers. Others keep what they had, or get anything:
        nothing reads a row whose slot has no use for it.

        One copy to the device and no wait, as for `update`.

        Args:
            values_TC: float32 [rows in all, C], C up to `columns`; the columns from C on stay.
            rows: which rows of the step these are, in order.
        """
        if not len(values_TC):
            return
        first, last = min(r.start for r in rows), max(r.stop for r in rows)
        table_TC = self.rows_TC[first:last, : values_TC.shape[1]]
        on_cpu = self.device.type == "cpu"
        host = table_TC if on_cpu else torch.empty(
            table_TC.shape, dtype=torch.float32, pin_memory=self.device.type == "cuda"
        )  # fmt: skip
        host_np, at = host.numpy(), 0
        for r in rows:
            count = r.stop - r.start
            host_np[r.start - first : r.stop - first] = values_TC[at : at + count]
            at += count
        if not on_cpu:
            table_TC.copy_(host, non_blocking=True)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, every row is the base model's; then the step is again what it was."""
        slots_T, frozen = self._slots_T, self.frozen
        self.update(np.full_like(slots_T, -1))
        try:
            yield
        finally:
            self.update(slots_T)
            self.frozen = frozen

    @property
    def active(self) -> bool:
        """Whether any row of the step has an adapter."""
        return bool(self.active_1[0])

    @property
    def order_T(self) -> torch.Tensor:
        """Rows that have a slot, sorted by it."""
        return self.table[1]

    def tiles(self, rows: int) -> torch.Tensor:
        """[3, max_tokens]: slot, start and stop of every tile of up to `rows` rows."""
        at = 2 + 3 * TILE_ROWS.index(rows)
        return self.table[at : at + 3]

    @property
    def slots(self) -> frozenset[int]:
        """The slots that rows of the step use."""
        if self._slots is None:
            self._slots = frozenset(np.unique(self._slots_T).tolist()) - {-1}
        return self._slots

    @property
    def groups(self) -> list[Group]:
        """The rows of every slot of the step, for backends that loop over slots."""
        if self._groups is None:
            self._groups = [self._group(slot) for slot in sorted(self.slots)]
        return self._groups

    def _group(self, slot: int) -> Group:
        rows_T = np.flatnonzero(self._slots_T == slot)
        start, stop = int(rows_T[0]), int(rows_T[-1]) + 1
        together = stop - start == len(rows_T)
        if together:
            return Group(slot, start, stop, None)
        pinned = self.device.type == "cuda"
        host_T = torch.empty(len(rows_T), dtype=torch.int64, pin_memory=pinned)
        host_T.numpy()[:] = rows_T
        return Group(slot, start, stop, host_T.to(self.table.device, non_blocking=pinned))


def max_tiles(num_rows: int, num_slots: int, rows: int) -> int:
    """Most tiles that a step of `num_rows` rows can have: every slot may end in a part of one."""
    slots = min(num_rows, num_slots)
    return slots + (num_rows - slots) // rows


def _tile(out: np.ndarray, slots_T: np.ndarray) -> None:
    """Fills order, then slot, start and stop for every tile size."""
    order_T = np.argsort(slots_T, kind="stable")
    order_T = order_T[np.count_nonzero(slots_T < 0) :]
    out[0, : len(order_T)] = order_T
    slots, first, count = np.unique(slots_T[order_T], return_index=True, return_counts=True)
    for i, rows in enumerate(TILE_ROWS):
        tiles = -(-count // rows)
        group = np.repeat(np.arange(len(slots)), tiles)
        number = np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        start = first[group] + rows * number
        stop = np.minimum(start + rows, (first + count)[group])
        out[1 + 3 * i : 4 + 3 * i, : len(group)] = slots[group], start, stop
