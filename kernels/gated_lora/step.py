"""StepMap: which slot each row of the batch uses. Written once a step, read by every site."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


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

    Args:
        max_tokens: most rows a step may hold.
        device: where `token_slots_T` lives; its address never changes.
    """

    def __init__(self, max_tokens: int, device: torch.device | str = "cpu") -> None:
        self.token_slots_T = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self.groups: list[Group] = []

    def update(self, slots_T: np.ndarray) -> None:
        """Takes the slot of every row (int, [T]; -1: base model). Rows past T count as base."""
        n = len(slots_T)
        self.token_slots_T[n:].fill_(-1)
        self.token_slots_T[:n].copy_(torch.from_numpy(slots_T.astype(np.int32)))
        self.groups = [self._group(slot, slots_T) for slot in np.unique(slots_T) if slot >= 0]

    def _group(self, slot: int, slots_T: np.ndarray) -> Group:
        rows_T = np.flatnonzero(slots_T == slot)
        start, stop = int(rows_T[0]), int(rows_T[-1]) + 1
        together = stop - start == len(rows_T)
        index_T = None if together else torch.from_numpy(rows_T).to(self.token_slots_T.device)
        return Group(int(slot), start, stop, index_T)
