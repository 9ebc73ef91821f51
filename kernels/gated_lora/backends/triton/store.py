"""What the Triton kernels keep of a site's slots: B of all slices side by side, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vllm_lora_ext.kernels.gated_lora.backends.base import Filled, Store
from vllm_lora_ext.kernels.gated_lora.backends.triton.tables import SlotTables
from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, Shape, SlicePlan

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site


class TableStore(Store):
    """All that the kernels read, at addresses that never change.

    Attributes:
        b_SRN: [slots, max_rank, N of all slices], of which `bt_SRN` are views.
        tables: what each slot adds.
        routers_2: address and slot stride of the routers, for captured graphs too.
        rescale_1: address of scale and shift of the layer's own output, likewise.
    """

    def __init__(
        self,
        num_slots: int,
        slice_sizes: Sequence[int],
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._sizes = tuple(slice_sizes)
        self.b_SRN = torch.zeros(num_slots, max_rank, sum(slice_sizes), dtype=dtype, device=device)
        super().__init__(dtype, self.b_SRN.split(self._sizes, dim=2))
        self.tables = SlotTables(num_slots, slice_sizes, max_rank, device)
        self.routers_2 = torch.zeros(2, dtype=torch.int64, device=device)
        self.rescale_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def shapes(self, parts: Sequence[Filled]) -> list[Shape]:
        ranks = [0] * len(self._sizes)  # of each slice
        for i, rank in parts:
            ranks[i] += rank
        return [((max(ranks), sum(self._sizes)), self.dtype), *self.tables.shapes()]

    def places(self, stored: Sequence[torch.Tensor], parts: Sequence[Filled]) -> list[torch.Tensor]:
        left = list(stored[0].zero_().split(self._sizes, dim=1))  # of each slice
        found = []
        for i, rank in parts:
            place, left[i] = left[i][:rank], left[i][rank:]
            found.append(place)
        return found

    def copy(self, slot: int, packed: PackedSite) -> None:
        b_RN = packed.stored[0]
        self.b_SRN[slot, : len(b_RN)].copy_(b_RN, non_blocking=True)

    def describe(
        self,
        stored: Sequence[torch.Tensor],
        a_rows: int,
        router_rows: int,
        slices: Iterable[tuple[int, SlicePlan]],
    ) -> None:
        self.tables.describe(a_rows, router_rows, slices, *stored[1:])

    def load(self, slot: int, stored: Sequence[torch.Tensor]) -> None:
        self.tables.load(slot, *stored[1:])

    def clear(self, slot: int) -> None:
        self.tables.clear(slot)

    def rescale_made(self, rescale_S2N: torch.Tensor) -> None:
        self.rescale_1.fill_(rescale_S2N.data_ptr())

    def routers_moved(self, router_SGK: torch.Tensor) -> None:
        self.routers_2.copy_(torch.tensor([router_SGK.data_ptr(), router_SGK.stride(0)]))


def store_of(site: Site) -> TableStore:
    """The store of a site whose backend these kernels are."""
    return cast(TableStore, site.store)
