"""BlockSite: the slot tables of one MLP block, and what runs around its three steps.

Weights live in the `Site`s of the block's two linears, so that a block costs no memory of its own.
The first linear's site holds A and B of gate and up, and the router; the second's those of down.

Where the sites run the Triton kernels, a block does too: one launch more than its two linears have
anyway (`triton_mix`). What the launches hand on lies in two buffers that all blocks of an engine
share (`Scratch`), since blocks run one after the other; they are arguments of the ops (`op`), so
the compiler sees who writes and who reads them, and a captured graph finds them where they were.

Activations that the kernel does not know, and experts that scale the second linear's bias, take the
PyTorch path below, as all do on a CPU: a loop over slots and experts that waits for the device, and
keeps the shrunk rows here between the three ops. No graph can hold it (`BlockSite.on_kernel`).

What the experts change of the block's output may be multiplied (`BlockSite.scaled`):
y = base + s (mixed - base). As down is linear, s multiplies a's change, z and the bias's change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, Shape, SlicePlan, SlotPlan
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import Group
from vllm_lora_ext.kernels.mix_mlp.tables import BlockTables, tables_for
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.routing.mix import expert_weights
from vllm_lora_ext.routing.reference import GatedSlice

Activation = Callable[[torch.Tensor], torch.Tensor]


class Scratch(NamedTuple):
    """What the kernels of a block hand on, for all blocks of an engine: flat, fp32, on the device.

    `u` is the shrink of a block's first linear, `z` that of the second.
    """

    u: torch.Tensor
    z: torch.Tensor


def scratch_for(blocks: Sequence[BlockSite], max_tokens: int, dtype: torch.dtype) -> Scratch | None:
    """Scratch of blocks on the Triton kernels for steps of up to `max_tokens` rows in `dtype`, the
    model's; None where there are none."""
    if not blocks or not isinstance(blocks[0].tables, BlockTables):
        return None
    from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import parts_size

    device = blocks[0].first.a_SRK.device
    sizes = (
        max(parts_size(max_tokens, dtype, site) for site in sites)
        for sites in zip(*((b.first, b.last) for b in blocks), strict=True)
    )
    return Scratch(*(torch.zeros(n, dtype=torch.float32, device=device) for n in sizes))


@dataclass(frozen=True)
class BlockPlan:
    """One adapter at one block.

    Args:
        gate: how the experts are weighted; its blocks are their ranks.
        first: where the first linear's parts stand; its slices are gate (with the router) and up.
        last: the same of the second linear's one part, or None when it has no experts.
        act: the activation over [gate | up], as the model's own.
        sums_to_one: the weights always do, so that a bias of the second linear is not scaled.
        scale, factor_at: as in `PackedBlock`.
    """

    gate: GateSpec
    first: SlotPlan
    last: SlotPlan | None
    act: Activation
    sums_to_one: bool
    scale: float
    factor_at: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last rank of every expert."""
        return list(pairwise(accumulate(self.gate.blocks, initial=0)))


@dataclass(frozen=True)
class PackedBlock:
    """One adapter's experts at one block in host memory, as its slot will hold them.

    Args:
        gate, act, sums_to_one: as in `BlockPlan`.
        first, last: of the two linears.
        tables: the slot's rows of `BlockTables`; empty without them.
        on_kernels: whether the Triton kernels serve it.
        scale: multiplies what the experts change; factor_at: so does this column of
            `StepMap.rows_TC` (-1: none).
    """

    gate: GateSpec
    first: PackedSite
    last: PackedSite | None
    act: Activation
    sums_to_one: bool
    tables: tuple[torch.Tensor, ...]
    on_kernels: bool
    scale: float = 1.0
    factor_at: int = -1


class BlockSite:
    """The experts of every slot at one MLP block.

    Args:
        first, last: sites of the block's two linears.
        act: the model's own activation: [T, gate | up] → [T, inner], or elementwise without a gate.
        last_bias_N: bias of the second linear as this rank adds it, None when there is none.
        act_name: what the model's activation computes, a name of `codes.ACTIVATIONS` or None.
    Attributes:
        plans: by slot, what the PyTorch path serves; on_kernels: the slots that the kernels serve.
    """

    def __init__(
        self,
        first: Site,
        last: Site,
        act: Activation,
        last_bias_N: torch.Tensor | None = None,
        act_name: str | None = None,
    ) -> None:
        self.first, self.last, self.act, self.last_bias_N = first, last, act, last_bias_N
        self.act_name = act_name
        self.plans: dict[int, BlockPlan] = {}
        self.on_kernels: set[int] = set()
        self.tables = tables_for(first)
        self._by_row: set[int] = set()
        self._u: dict[int, torch.Tensor] = {}
        self._add: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Read by C++ at this address: `busy`.
        self.busy_1 = np.zeros(1, dtype=np.int64)

    @property
    def busy(self) -> bool:
        """Whether any slot has experts here that the PyTorch path serves."""
        return bool(self.busy_1[0])

    @property
    def rows_TC(self) -> torch.Tensor | None:
        """As `Site.rows_TC`."""
        return self.first.step.rows_TC if self.first.static or self._by_row else None

    def on_kernel(self, gate: GateSpec, act_name: str | None = None) -> bool:
        """Whether the kernel would serve experts with this gate, and this activation in place of
        the model's; else PyTorch does."""
        sums = self.last_bias_N is None or _sums_to_one(gate)
        return self.tables.serves(act_name or self.act_name) and sums

    def _look(self) -> None:
        """Listens to the linears while PyTorch serves experts here, and not longer: it costs
        them."""
        busy = bool(self.plans)
        if busy != self.busy:
            self.busy_1[0] = busy
            for site, after in ((self.first, self.hold), (self.last, self.add_down)):
                site.listen(after, first=True) if busy else site.forget(after)

    def clear(self, slot: int) -> None:
        """The slot adds nothing any more."""
        self.plans.pop(slot, None)
        self._by_row.discard(slot)
        if slot in self.on_kernels:
            self.on_kernels.discard(slot)
            self.tables.clear(slot)
            self.first.clear(slot)
            self.last.clear(slot)
        self._look()

    def write(
        self,
        slot: int,
        gate: GateSpec,
        first: list[GatedSlice],
        last: GatedSlice | None,
        act: Activation | None = None,
        act_name: str | None = None,
    ) -> None:
        """Puts one adapter into a slot; arguments and errors as for `pack`."""
        self.clear(slot)
        self.load(slot, self.pack(gate, first, last, act, act_name))

    def shapes(self, first: list[GatedSlice], last: GatedSlice | None) -> list[Shape]:
        """Shapes and dtypes of the tensors of the packed form, in its order.

        Raises:
            ValueError: a part does not fit the buffers.
        """
        last_shapes = [] if last is None else self.last.shapes([last])
        return [*self.first.shapes(first), *last_shapes, *self.tables.shapes()]

    def pack(
        self,
        gate: GateSpec,
        first: list[GatedSlice],
        last: GatedSlice | None,
        act: Activation | None = None,
        act_name: str | None = None,
        out: Sequence[torch.Tensor] | None = None,
    ) -> PackedBlock:
        """One adapter's experts in the form in which a slot holds them.

        Args:
            first: gate (or the only one, without a gate) with the block's router, then up.
            last: down, all of its output columns.
            act, act_name: in place of the model's.
            out: the tensors to fill, as `shapes` says; None: new ones.
        Raises:
            ValueError: a part does not fit the buffers.
        """
        shapes = self.shapes(first, last)
        if out is None:
            out = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        num_first = len(self.first.shapes(first))
        num_last = 0 if last is None else len(self.last.shapes([last]))
        first_packed = self.first.pack(first, out[:num_first])
        assert first_packed is not None
        last_packed = None
        if last is not None:
            last_packed = self.last.pack([last], out[num_first : num_first + num_last])
        packed = PackedBlock(
            gate, first_packed, last_packed, act or self.act, _sums_to_one(gate),
            tuple(out[num_first + num_last :]), self.on_kernel(gate, act_name),
        )  # fmt: skip
        name = act_name or self.act_name
        if packed.on_kernels:
            assert name is not None
            self._describe(packed, name)
        return packed

    def scaled(
        self, packed: PackedBlock, scale: float, factor_at: int, out: Sequence[torch.Tensor]
    ) -> PackedBlock:
        """The same experts, whose change of the block's output is multiplied.

        Args:
            scale, factor_at: as in `PackedBlock`.
            out: the tensors to fill, as `tables.scaled_shapes` says; the others are `packed`'s.
        """
        tables = self.tables.scaled(packed.tables, scale, factor_at, out)
        return replace(packed, scale=scale, factor_at=factor_at, tables=tables)

    def _describe(self, packed: PackedBlock, act_name: str) -> None:
        """The first linear's kernels shrink for the slot and add nothing; the second's only
        expand."""
        first, last = packed.first, packed.last
        self.first.store.describe(first.stored, len(first.a_RK), len(first.router_GK), [])
        if last is not None:
            self.last.store.describe(last.stored, 0, 0, last.slices)
        plans = [plan for _, plan in first.slices]
        self.tables.describe(plans, last is not None, act_name, packed.tables)

    def load(self, slot: int, packed: PackedBlock) -> None:
        """Puts what `pack` made into a slot: copies only, and no wait for any of them."""
        self.clear(slot)
        first = self.first.hold(slot, packed.first)
        last = None if packed.last is None else self.last.hold(slot, packed.last)
        if packed.on_kernels:
            self.first.store.load(slot, packed.first.stored)
            if packed.last is not None:
                self.last.store.load(slot, packed.last.stored)
            self.tables.load(slot, packed.tables)
            self.on_kernels.add(slot)
        else:
            self.plans[slot] = BlockPlan(
                packed.gate, first, last, packed.act, packed.sums_to_one, packed.scale,
                packed.factor_at,
            )  # fmt: skip
        if packed.factor_at >= 0:
            self._by_row.add(slot)
        self._look()

    def hold(self, _y_TN: torch.Tensor, x_TK: torch.Tensor, _u: torch.Tensor | None) -> None:
        """After the first linear: shrinks the rows of the slots that have experts here."""
        for group in self.first.step.groups:
            plan = self.plans.get(group.slot)
            if plan is not None:
                rows_TK = _rows(self.first.own_x(x_TK), group)
                self._u[group.slot] = self.first.whole(plan.first.shrink(rows_TK))

    def mix_act_(self, a_TI: torch.Tensor, gate_up_TN: torch.Tensor) -> None:
        """Puts `sum_e v_e a_e` in place of the activations of rows that have experts here."""
        if not self.plans:
            return
        for group in self.first.step.groups:
            plan = self.plans.get(group.slot)
            if plan is None:
                continue
            u_TR = self._u.pop(group.slot)
            mixed_TI, z_TR, total_T = _mix(plan, _rows(gate_up_TN, group).float(), u_TR)
            more_T, factor_T1 = total_T - 1, self._factor(plan, group)
            if factor_T1 is not None:
                own_TI = _rows(a_TI, group).float()
                mixed_TI = own_TI + factor_T1 * (mixed_TI - own_TI)
                z_TR, more_T = factor_T1 * z_TR, factor_T1[:, 0] * more_T
            self._add[group.slot] = z_TR, more_T
            if group.index_T is None:
                a_TI[group.start : group.stop] = mixed_TI.to(a_TI.dtype)
            else:
                a_TI[group.index_T] = mixed_TI.to(a_TI.dtype)

    def _factor(self, plan: BlockPlan, group: Group) -> torch.Tensor | None:
        """[rows, 1]: what multiplies the experts' change of each row; None: nothing does."""
        if plan.factor_at < 0 and plan.scale == 1.0:
            return None
        if plan.factor_at < 0:
            return torch.full((1, 1), plan.scale, device=self.first.step.device)
        return plan.scale * _rows(self.first.step.rows_TC, group)[:, plan.factor_at, None]

    def add_down(self, y_TN: torch.Tensor, _x: torch.Tensor, _u: torch.Tensor | None) -> None:
        """After the second linear: adds the experts' down parts, already weighted. A rank that has
        a shard of a adds its part of the sum."""
        for group in self.last.step.groups if self.plans else ():
            plan = self.plans.get(group.slot)
            if plan is None:
                continue
            z_TR, more_T = self._add.pop(group.slot)
            if plan.last is not None:
                p = plan.last.slices[0]
                delta_TN = torch.mm(self.last.whole(z_TR), p.bt_RN.float())
                _add_rows_(self.last.own_y(y_TN)[:, p.y_start : p.y_stop], group, delta_TN)
            if self.last_bias_N is not None and not plan.sums_to_one:
                _add_rows_(y_TN, group, more_T[:, None] * self.last_bias_N.float())


def _sums_to_one(gate: GateSpec) -> bool:
    """Whether the experts' weights always do."""
    return gate.weight in ("renormalise", "softmax") and gate.constant == 1.0


def _mix(
    plan: BlockPlan, base_TN: torch.Tensor, u_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixed activations [T, inner], the weighted A_d a_e of every rank, the sum of weights."""
    slices = plan.first.slices
    at = slices[0].router_start
    v_TE = expert_weights(plan.gate, u_TR[:, at : at + plan.gate.num_gates])
    chosen_TE = v_TE != 0
    z_TR = u_TR.new_zeros(len(u_TR), sum(plan.gate.blocks))
    mixed: torch.Tensor | None = None
    for e, (start, stop) in enumerate(plan.spans):
        rows_T = torch.nonzero(chosen_TE[:, e]).flatten()
        if not len(rows_T):
            continue
        a_TI = plan.act(_expert_input(slices, base_TN[rows_T], u_TR[rows_T], start, stop))
        if plan.last is not None:
            a_d_RI = plan.last.a_RK[start:stop].float()
            z_TR[rows_T, start:stop] = v_TE[rows_T, e, None] * torch.mm(a_TI, a_d_RI.t())
        if mixed is None:
            mixed = base_TN.new_zeros(len(u_TR), a_TI.shape[1])
        mixed.index_add_(0, rows_T, v_TE[rows_T, e, None] * a_TI)
    if mixed is None:  # no expert at all: the block's output is zero, as the formula has it
        mixed = torch.zeros_like(plan.act(base_TN))
    return mixed, z_TR, v_TE.sum(dim=1)


def _expert_input(
    slices: tuple[SlicePlan, ...], base_TN: torch.Tensor, u_TR: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """gate(x) and up(x) of one expert, side by side."""
    parts, at = [], 0
    for p in slices:
        width = p.y_stop - p.y_start
        part = base_TN[:, at : at + width]
        if p.a_stop > p.a_start:
            h_TR = u_TR[:, p.a_start + start : p.a_start + stop]
            part = torch.addmm(part, h_TR, p.bt_RN[start:stop].float())
        parts.append(part)
        at += width
    return torch.cat(parts, dim=1)


def _rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    if group.index_T is None:
        return x[group.start : group.stop]
    return x.index_select(0, group.index_T)


def _add_rows_(y_TN: torch.Tensor, group: Group, add_TN: torch.Tensor) -> None:
    if group.index_T is None:
        y_TN[group.start : group.stop] += add_TN.to(y_TN.dtype)
    else:
        y_TN.index_add_(0, group.index_T, add_TN.to(y_TN.dtype))
