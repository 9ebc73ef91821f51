"""What a backend of MLP blocks is: which launch of its own a block has, and what that reads.

A backend is a module that has the names of `BlockBackend`: `eager` (PyTorch, on every device) and
`triton.backend`. A block has the one that goes with its linears' (`choice`), which was chosen for
the engine before its layers were built; nothing asks again which one it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from vllm_lora_ext.kernels.gated_lora.plan import Shape, SlicePlan

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site
    from vllm_lora_ext.kernels.mix_mlp.block import BlockSite


class Scratch(NamedTuple):
    """What the launches of a block hand on, for all blocks of an engine: flat, fp32, on the device.

    `u` is the shrink of a block's first linear, `z` that of the second.
    """

    u: torch.Tensor
    z: torch.Tensor


class Tables:
    """What a backend keeps of the slots of one block, beside what the linears' sites hold. As it
    stands: nothing, and no activation is known."""

    def serves(self, act: str | None) -> bool:
        """Whether the kernel knows an activation."""
        return False

    def shapes(self) -> list[Shape]:
        """Of one slot's rows, as `describe` fills them."""
        return []

    def clear(self, slot: int) -> None:
        """The slot has no experts here any more."""

    def describe(
        self, first: Sequence[SlicePlan], down: bool, act: str, rows: Sequence[torch.Tensor]
    ) -> None:
        """Fills one slot's rows, in host memory, for one adapter.

        Args:
            first: the parts of the first linear; the first one has the block's gate.
            down: whether the second linear has experts.
            act: one that is served.
        """

    def scaled_shapes(self) -> list[Shape]:
        """Of those of a slot's rows that `scaled` fills."""
        return []

    def scaled(
        self,
        rows: Sequence[torch.Tensor],
        scale: float,
        factor_at: int,
        out: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """One slot's rows, as `describe` fills them, for experts whose change is multiplied.

        Args:
            scale, factor_at: as in `PackedBlock`; out: the tensors to fill.
        """
        return tuple(rows)

    def load(self, slot: int, rows: Sequence[torch.Tensor]) -> None:
        """Copies what `describe` filled into a slot."""


class BlockBackend(Protocol):
    """A module with these names."""

    def make_tables(self, first: Site) -> Tables:
        """Of a block with this first linear; no slot has experts yet."""

    def scratch(
        self, blocks: Sequence[BlockSite], max_tokens: int, dtype: torch.dtype
    ) -> Scratch | None:
        """For steps of up to `max_tokens` rows in `dtype`, the model's; None where no block has a
        launch of its own."""

    def mix_(
        self,
        a_TI: torch.Tensor,
        z: torch.Tensor,
        gate_up_TN: torch.Tensor,
        u: torch.Tensor,
        block: BlockSite,
    ) -> None:
        """The launch between the two linears.

        Args:
            a_TI: the base model's activations; rows with experts get theirs in place of them.
            gate_up_TN: what the first linear made of x.
            z, u: of `Scratch`; u is read, and z written.
        """

    def warm(self, blocks: Iterable[BlockSite], max_tokens: int, dtype: torch.dtype) -> None:
        """Compiles what blocks can need beside their linears; arguments as of `Backend.warm`."""
