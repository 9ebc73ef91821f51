"""Which numbers of a row multiply the ranks of an embedding or an output matrix."""

from __future__ import annotations

import torch


class Factors:
    """Of every slot at one layer, in a table whose address never changes.

    Args:
        num_slots, max_rank: as of the layer.
        device: of the layer.
    Attributes:
        slots: those that have some.
        table_SR: int64 [slots, max_rank], column of `StepMap.rows_TC`; -1: none, factor 1.
    """

    def __init__(self, num_slots: int, max_rank: int, device: torch.device) -> None:
        self.slots: set[int] = set()
        self.table_SR = torch.full((num_slots, max_rank), -1, dtype=torch.int64, device=device)

    def set(self, slot: int, columns_R: torch.Tensor) -> None:
        """Gives a slot the columns of its ranks."""
        self.clear(slot)
        self.table_SR[slot, : len(columns_R)].copy_(columns_R, non_blocking=True)
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        """The slot's ranks are as they are."""
        if slot in self.slots:
            self.slots.discard(slot)
            self.table_SR[slot] = -1

    def of(self, slot: int, numbers_NC: torch.Tensor) -> torch.Tensor:
        """fp32 [N, max_rank]: what multiplies the slot's ranks, of rows with these numbers."""
        columns_R = self.table_SR[slot]
        return torch.where(columns_R >= 0, numbers_NC[:, columns_R.clamp(min=0)], 1.0)

    def of_rows(self, slots_T: torch.Tensor, numbers_TC: torch.Tensor) -> torch.Tensor:
        """The same of each row's own slot, [T, max_rank]; rows without one get anything."""
        columns_TR = self.table_SR[slots_T.clamp(min=0).long()]
        return torch.where(columns_TR >= 0, numbers_TC.gather(1, columns_TR.clamp(min=0)), 1.0)
