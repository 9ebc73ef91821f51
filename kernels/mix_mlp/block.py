"""BlockSite: the slot tables of one MLP block, and what runs around its three steps.

Weights live in the `Site`s of the block's two linears, so that a block costs no memory of its own.
The first linear's site holds A and B of gate and up, and the router; the second's those of down.

A backend may have a launch of its own between the linears (`backends`). Activations that it does
not know, and experts that scale the second linear's bias, take the PyTorch path (`backends.eager`),
as all do on a CPU, which keeps the shrunk rows here between the three ops. No graph can hold it
(`BlockSite.on_kernel`).

What the experts change of the block's output may be multiplied (`BlockSite.scaled`):
y = base + s (mixed - base). As down is linear, s multiplies a's change, z and the bias's change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.plan import Shape
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import Group
from vllm_lora_ext.kernels.mix_mlp.backends import choice, eager
from vllm_lora_ext.kernels.mix_mlp.backends.base import Scratch
from vllm_lora_ext.kernels.mix_mlp.plan import Activation, BlockPlan, PackedBlock, sums_to_one
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.routing.reference import GatedSlice


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
        self.backend = choice.beside(first.backend)
        self.tables = self.backend.make_tables(first)
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
        sums = self.last_bias_N is None or sums_to_one(gate)
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
            gate, first_packed, last_packed, act or self.act, sums_to_one(gate),
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
                rows_TK = eager.rows_of(self.first.own_x(x_TK), group)
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
            base_TN = eager.rows_of(gate_up_TN, group).float()
            mixed_TI, z_TR, total_T = eager.mix(plan, base_TN, u_TR)
            more_T, factor_T1 = total_T - 1, self._factor(plan, group)
            if factor_T1 is not None:
                own_TI = eager.rows_of(a_TI, group).float()
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
        return plan.scale * eager.rows_of(self.first.step.rows_TC, group)[:, plan.factor_at, None]

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
                eager.add_rows_(self.last.own_y(y_TN)[:, p.y_start : p.y_stop], group, delta_TN)
            if self.last_bias_N is not None and not plan.sums_to_one:
                eager.add_rows_(y_TN, group, more_T[:, None] * self.last_bias_N.float())


def scratch_for(blocks: Sequence[BlockSite], max_tokens: int, dtype: torch.dtype) -> Scratch | None:
    """What an engine's blocks share (`BlockBackend.scratch`); None where there are none."""
    return blocks[0].backend.scratch(blocks, max_tokens, dtype) if blocks else None


def warm_blocks(blocks: Sequence[BlockSite], max_tokens: int, dtype: torch.dtype) -> None:
    """Compiles what an engine's blocks can need beside their linears."""
    if blocks:
        blocks[0].backend.warm(blocks, max_tokens, dtype)
