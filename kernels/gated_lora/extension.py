"""Extension: A and routers of every slot as rows below a base layer's weight.

    [ W ]                 N rows, the base layer's
    [ A of slot 0 ]       `ranks` rows, those in use in front
    [ its routers ]       `routers` rows, `parts` times
    [ A of slot 1 ] ...

One product x W^T then has the layer's own output and every shrink: a site costs one launch beside
the product, not two. The product reads the rows of all slots in every step that has an adapter, so
it pays only where these are few (`SHARE`) and the step is small (`MOST_ROWS`);
`kernels/README.md` has the model. Others take the two launches, which read the same A.

A router in a narrow dtype would choose other experts for about one token in a hundred. So a row of
it is kept as three, each what is left of it after the one before: 3 · 8 bits of bf16 are the 24 of
fp32. Their products with x are exact in fp32, and so is the sum of the three.
"""

from __future__ import annotations

import torch

SHARE = 0.1  # up to which it pays: all slots' rows, in those of the base weight
MOST_ROWS = 64  # of a step
ALIGNED = 16  # rows of a slot are a multiple: rows of the product then begin at 64 bytes
PARTS = {torch.float32: 1, torch.bfloat16: 3}  # fp16 has no numbers small enough for the third


class Extension:
    """A base layer's weight with room for the slots below it.

    Args:
        weight_NK: the base layer's, in the dtype of A; its numbers come with `follow`.
        num_slots, ranks, routers: slots, and most rows of A and of routers in one, all slices
            together.
    Attributes:
        weight_EK: [rows, K], of base and slots; base_NK: its base rows.
        a_SRK: [slots, ranks, K] of it.
        parts: rows that one row of a router takes.
        slot_rows: rows from one slot to the next.
    """

    def __init__(self, weight_NK: torch.Tensor, num_slots: int, ranks: int, routers: int) -> None:
        n, k = weight_NK.shape
        self.ranks, self.routers, self.parts = ranks, routers, PARTS[weight_NK.dtype]
        self.slot_rows = _slot_rows(ranks, routers, weight_NK.dtype)
        self.weight_EK = weight_NK.new_zeros(n + num_slots * self.slot_rows, k)
        self.base_NK = self.weight_EK[:n]
        slots_SXK = self.weight_EK[n:].view(num_slots, self.slot_rows, k)
        self.a_SRK = slots_SXK[:, :ranks]
        last = ranks + self.parts * routers
        self._routers_SPGK = slots_SXK[:, ranks:last].unflatten(1, (self.parts, routers))

    @property
    def rows(self) -> int:
        """Of base and slots: columns of the product."""
        return len(self.weight_EK)

    def follow(self, weight_NK: torch.Tensor) -> None:
        """Takes the base layer's numbers, whose memory from now on is here. To be called again
        where somebody has put others in their place."""
        if weight_NK.data_ptr() != self.base_NK.data_ptr():
            self.base_NK.copy_(weight_NK)
            weight_NK.data = self.base_NK

    def put_routers(self, slot: int, router_GK: torch.Tensor) -> None:
        """Writes a slot's routers, fp32 and on the device, without a wait."""
        left_GK = router_GK
        for part_GK in self._routers_SPGK[slot]:
            own_GK = part_GK[: len(router_GK)].copy_(left_GK)
            left_GK = left_GK - own_GK.float()

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """x W^T in fp32, [T, rows]."""
        if x_TK.dtype is torch.float32 or x_TK.is_cpu:  # a CPU has no product with another sum
            return torch.mm(x_TK.float(), self.weight_EK.float().t())
        return torch.mm(x_TK, self.weight_EK.t(), out_dtype=torch.float32)


def fits(
    weight_NK: torch.Tensor,
    num_slots: int,
    slices: int,
    max_rank: int,
    max_router_rows: int,
    share: float = SHARE,
) -> bool:
    """Whether the rows of all slots are few beside those of a base layer: up to `share` of them.
    Other arguments are as for `Site`."""
    if weight_NK.dtype not in PARTS:
        return False
    rows = _slot_rows(*stack(slices, max_rank, max_router_rows), weight_NK.dtype)
    return num_slots * rows <= share * len(weight_NK)


def stack(slices: int, max_rank: int, max_router_rows: int) -> tuple[int, int]:
    """Most rows of A in a slot, and most of routers and threshold heads."""
    return slices * max_rank, slices * (max_router_rows + 1)


def _slot_rows(ranks: int, routers: int, dtype: torch.dtype) -> int:
    rows = ranks + PARTS[dtype] * routers
    return -(-rows // ALIGNED) * ALIGNED
