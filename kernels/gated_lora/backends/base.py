"""What a backend is: how one engine's sites keep their slots, and how they compute.

A backend is a module that has the names of `Backend`: `eager` (PyTorch), `native.backend` (C++ on a
CPU) and `triton.backend`. One is chosen for an engine before its layers are built (`choice`), and
every `Site` of the engine has it; nothing asks again which one it is.

The two launches are the seam. Everything between them (sums over ranks, MLP blocks, a trace that
listens) is written once, for all backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, Shape, SlicePlan

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

Filled = tuple[int, int]  # a slice's number, and how many ranks one plan has there


class Store:
    """What a backend keeps of the slots of one site, beside A and the routers, at addresses that
    never change. Its first three methods differ in every backend.

    Attributes:
        dtype: of A and B.
        bt_SRN: B of each slice, transposed: [slots, max_rank, N], in any strides.
        in_place: whether a slot may be an adapter's host copy where it stands, with nothing copied.
    """

    in_place = False

    def __init__(self, dtype: torch.dtype, bt_SRN: Iterable[torch.Tensor]) -> None:
        self.dtype, self.bt_SRN = dtype, tuple(bt_SRN)

    def shapes(self, parts: Sequence[Filled]) -> list[Shape]:
        """Shapes and dtypes of what it keeps of plans with these parts, a slice's together."""
        raise NotImplementedError

    def places(self, stored: Sequence[torch.Tensor], parts: Sequence[Filled]) -> list[torch.Tensor]:
        """Where in tensors of these shapes each part's B^T goes, [R, N]; all around it is zero."""
        raise NotImplementedError

    def copy(self, slot: int, packed: PackedSite) -> None:
        """Copies an adapter's B into a slot, without a wait and without the slot adding it."""
        raise NotImplementedError

    def describe(
        self,
        stored: Sequence[torch.Tensor],
        a_rows: int,
        router_rows: int,
        slices: Iterable[tuple[int, SlicePlan]],
    ) -> None:
        """Fills what else of `stored` the backend reads: rows in use, and what each slice adds."""

    def load(self, slot: int, stored: Sequence[torch.Tensor]) -> None:
        """From now on the slot adds what `describe` was told."""

    def clear(self, slot: int) -> None:
        """The slot adds nothing any more."""

    def routers_moved(self, router_SGK: torch.Tensor) -> None:
        """The routers of all slots have new memory."""

    def rescale_made(self, rescale_S2N: torch.Tensor) -> None:
        """Slots have memory for scale and shift of the layer's own output: [slots, 2, N] fp32."""

    def changed(self) -> None:
        """What was made of the site's plans, its step or who listens holds no more."""

    def slot_changed(self, site: Site, slot: int) -> None:
        """Another plan stands in a slot, or none."""
        self.changed()

    def asked(self, number: int, site: Site) -> None:
        """After a call of the op in C++ that had to ask Python (`native.op`); `number` is the
        site's."""


class Backend(Protocol):
    """A module with these names."""

    @property
    def on_device(self) -> bool:
        """Whether the first launch runs without the host knowing the step's slots, so that it can
        run beside the base product, and CUDA graphs can hold both. It then reads the step's tiles
        (`StepMap`)."""

    def make_store(
        self,
        num_slots: int,
        slice_sizes: Sequence[int],
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Store:
        """Zeros for a site's slots; arguments as of `Site`."""

    def shrink(
        self, x_TK: torch.Tensor, site: Site, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """First launch: `[A; router] x` of each row's own slot.

        Args:
            memory: where to put it, for a backend that is `on_device`; None: new memory.
        Returns:
            [parts, T, site.num_rows] fp32, to be summed over the parts.
        """

    def expand_(
        self,
        y_TN: torch.Tensor,
        u_PTR: torch.Tensor,
        site: Site,
        v_PTR: torch.Tensor | None = None,
    ) -> None:
        """Second launch: adds `B (g ⊙ A x)` to y in place, which a plan's `rescale` has changed
        before; gates read v, by default u."""

    def gated_lora_(self, y_TN: torch.Tensor, x_TK: torch.Tensor, site: Site) -> None:
        """Both, where nobody needs to know what is between them."""

    def warm(self, sites: Iterable[Site], max_tokens: int, dtype: torch.dtype) -> None:
        """Compiles all that a step of up to `max_tokens` rows in `dtype` can need."""
