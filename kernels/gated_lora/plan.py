"""Where an adapter's numbers stand in a slot of a `Site`, and in the columns of a shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_lora_ext.routing import GateSpec

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class SlicePlan:
    """Where one slice's numbers stand: columns of u, columns of y, its gate and its B.

    `bt_RN` has more rows than A when its experts share one A.
    """

    gate: GateSpec
    y_start: int
    y_stop: int
    a_start: int
    a_stop: int
    router_start: int
    head_at: int
    bt_RN: torch.Tensor
    bias_G: torch.Tensor | None
    head_bias: float

    @property
    def shares_a(self) -> bool:
        return self.bt_RN.shape[0] != self.a_stop - self.a_start


@dataclass(frozen=True)
class SlotPlan:
    """One adapter at one site: A of every slice, and its routers and heads (fp32).

    `shared` is the one gate of all slices when they agree and stand side by side in u, so that
    all slices are gated at once; else None.
    """

    a_RK: torch.Tensor
    router_GK: torch.Tensor
    slices: tuple[SlicePlan, ...]
    shared: GateSpec | None
    plain: bool

    @property
    def num_ranks(self) -> int:
        return self.a_RK.shape[0]

    @property
    def num_rows(self) -> int:
        return self.num_ranks + self.router_GK.shape[0]

    @cached_property
    def inputs(self) -> tuple[slice, ...]:
        """Columns of u that gates read: routers and heads, and A x where a gate scores it."""
        own = [slice(p.a_start, p.a_stop) for p in self.slices if p.gate.source == "self"]
        routers = [slice(self.num_ranks, self.num_rows)] if len(self.router_GK) else []
        return (*own, *routers)

    @property
    def num_inputs(self) -> int:
        return sum(c.stop - c.start for c in self.inputs)

    def shrink(self, x_TK: torch.Tensor) -> torch.Tensor:
        """`[A; router] x`, [T, num_rows] fp32, with PyTorch."""
        x_TK = x_TK.float()
        ax_TR = torch.mm(x_TK, self.a_RK.t().float())
        if not len(self.router_GK):
            return ax_TR
        return torch.cat([ax_TR, torch.mm(x_TK, self.router_GK.t())], dim=1)


@dataclass(frozen=True)
class PackedSite:
    """One adapter's part at one site in host memory, as its slot will hold it.

    Args:
        a_RK, router_GK: A of every slice, and routers and heads (fp32).
        stored: what the backend keeps beside them (`Store.shapes`), B of every plan among it.
        slices: number and plan of each; `bt_RN` of a plan is a part of `stored`.
        shared, plain: as in `SlotPlan`.
    """

    a_RK: torch.Tensor
    router_GK: torch.Tensor
    stored: tuple[torch.Tensor, ...]
    slices: tuple[tuple[int, SlicePlan], ...]
    shared: GateSpec | None
    plain: bool


def shared_gate(plans: Sequence[SlicePlan]) -> GateSpec | None:
    """The slices' gate when one view of u holds all their logits and all blocks are equal."""
    gate = plans[0].gate
    same = all(p.gate == gate and p.bias_G is None and not p.shares_a for p in plans)
    if same and gate.router_rows > gate.head_rows == 0 and len(set(gate.blocks)) == 1:
        return gate
    return None
