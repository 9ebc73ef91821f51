"""Where an adapter's numbers stand in a slot of a `Site`, and in the columns of a shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from vllm_lora_ext.routing import GateSpec, InputNorm, Rescale
from vllm_lora_ext.routing.spec import GIVEN

Shape = tuple[tuple[int, ...], torch.dtype]

MAX_GATES = 8  # adapters with a gate that may stand at one slice
STATS = 2  # columns of u with the sum of x and of its squares, after a slot's routers


@dataclass(frozen=True)
class SlicePlan:
    """One adapter at one slice of a layer: columns of u and of y, its gate and its B. Several may
    stand at one slice, where a slot holds several adapters.

    Args:
        b_start: first of its ranks in the slice's B; bt_RN: these. It has more rows than A when
            its experts share one A.
        row_start: first of the numbers that come with each row (`StepMap.rows_TC`) which the gate
            reads, for sources `request` and `position`.
        factor_at: which of these numbers multiplies all that the adapter adds; -1: none.
        rescale: what becomes of the layer's own output in these columns of y, before.
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
    logit_bias_G: torch.Tensor | None = None
    norm: InputNorm | None = None
    b_start: int = 0
    row_start: int = 0
    factor_at: int = -1
    rescale: Rescale | None = None

    @property
    def shares_a(self) -> bool:
        return self.bt_RN.shape[0] != self.a_stop - self.a_start

    def rescaled_by(self, rescale_2N: torch.Tensor | None) -> SlicePlan:
        """With its columns of the layer's scale and shift in another place."""
        if self.rescale is None or rescale_2N is None:
            return self
        return replace(self, rescale=Rescale(*rescale_2N[:, self.y_start : self.y_stop]))

    @property
    def columns(self) -> int:
        """How many of a row's numbers there must be."""
        given = self.row_start + self.gate.columns if self.gate.columns else 0
        return max(given, self.factor_at + 1)

    def on(self, device: torch.device) -> SlicePlan:
        """With the gate's vectors on a device: for whoever computes it in PyTorch."""

        def there(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return replace(
            self, bias_G=there(self.bias_G), logit_bias_G=there(self.logit_bias_G),
            norm=self.norm and self.norm.map(there),
        )  # fmt: skip

    def logits(
        self, v_TR: torch.Tensor, stats_at: int, rows_TC: torch.Tensor | None
    ) -> torch.Tensor:
        """What the gate scores, [T, G].

        Args:
            v_TR: what gates read of the shrink, whose statistics of x are at `stats_at`.
            rows_TC: the rows' own numbers; None where no gate reads them.
        """
        if self.gate.source in GIVEN:
            assert rows_TC is not None
            return rows_TC[:, self.row_start : self.row_start + self.gate.num_gates]
        start = self.a_start if self.gate.source == "self" else self.router_start
        u_TG = v_TR[:, start : start + self.gate.num_gates]
        if self.norm is not None:
            stats = v_TR[:, stats_at], v_TR[:, stats_at + 1]
            u_TG = self.norm.logits(u_TG, *stats, self.gate.normalise_eps)
        return u_TG if self.logit_bias_G is None else u_TG + self.logit_bias_G


@dataclass(frozen=True)
class SlotPlan:
    """What stands in one slot of a site: A of every slice, and their routers and heads (fp32).

    `shared` is the one gate of all slices when they agree and stand side by side in u, so that
    all slices are gated at once; else None. `plain`: nothing is gated.
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
    def stats_at(self) -> int:
        """Where u has the sum of x and of its squares, if a router needs them (`normalised`)."""
        return self.num_ranks + self.router_GK.shape[0]

    @cached_property
    def normalised(self) -> bool:
        return any(p.norm is not None for p in self.slices)

    @property
    def num_rows(self) -> int:
        """Columns of u."""
        return self.stats_at + STATS * self.normalised

    @cached_property
    def columns(self) -> int:
        """How many numbers must come with each row."""
        return max(p.columns for p in self.slices)

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
        """`[A; router] x`, and what routers need to know of x itself: [T, num_rows] fp32."""
        x_TK = x_TK.float()
        ax_TR = torch.mm(x_TK, self.a_RK.t().float())
        if not len(self.router_GK):
            return ax_TR
        parts = [ax_TR, torch.mm(x_TK, self.router_GK.t())]
        if self.normalised:
            parts += [x_TK.sum(dim=1, keepdim=True), x_TK.square().sum(dim=1, keepdim=True)]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class PackedSite:
    """What one slot of a site is to hold, in host memory and in the slot's own form.

    Args:
        a_RK, router_GK: A of every slice, and routers and heads (fp32).
        stored: what the backend keeps beside them (`Store.shapes`), B of every plan among it.
        slices: number of the slice and plan, those of a slice together; `bt_RN` of a plan is a
            part of `stored`.
        shared, plain: as in `SlotPlan`.
        rescale_2N: scale and shift of the layer's own output, fp32, where a plan has some; the
            columns of its others hold anything.
    """

    a_RK: torch.Tensor
    router_GK: torch.Tensor
    stored: tuple[torch.Tensor, ...]
    slices: tuple[tuple[int, SlicePlan], ...]
    shared: GateSpec | None
    plain: bool
    rescale_2N: torch.Tensor | None = None

    @cached_property
    def plan(self) -> SlotPlan:
        """For a slot that reads all of it where it is."""
        return SlotPlan(
            self.a_RK, self.router_GK, tuple(plan for _, plan in self.slices), self.shared,
            self.plain,
        )  # fmt: skip

    @property
    def reads_x(self) -> bool:
        """Whether a gate scores what is computed from x."""
        return len(self.router_GK) > 0 or any(p.gate.source == "self" for _, p in self.slices)


def shared_gate(plans: Sequence[SlicePlan]) -> GateSpec | None:
    """The slices' gate when one view of u holds all their logits and all blocks are equal."""
    gate = plans[0].gate
    same = all(p.gate == gate and p.bias_G is None and not p.shares_a for p in plans)
    ours = gate.router_rows > gate.head_rows == 0 and gate.normalise == "none" and not gate.product
    if not (same and ours and len(set(gate.blocks)) == 1):
        return None
    return None if any(p.factor_at >= 0 or p.logit_bias_G is not None for p in plans) else gate


def is_plain(plans: Sequence[SlicePlan]) -> bool:
    """Whether `B A x` is added as it is."""
    return all(p.gate.source == "none" and p.factor_at < 0 for p in plans)
