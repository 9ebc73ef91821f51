"""Site: the slot tables of one (fused) linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vllm_lora_ext.kernels.gated_lora.backends.base import Backend
from vllm_lora_ext.kernels.gated_lora.backends.choice import best
from vllm_lora_ext.kernels.gated_lora.compose import Placed, compose, composed_shapes
from vllm_lora_ext.kernels.gated_lora.extension import Extension, stack
from vllm_lora_ext.kernels.gated_lora.plan import (
    STATS,
    PackedSite,
    Shape,
    SlicePlan,
    SlotPlan,
    is_plain,
    shared_gate,
)
from vllm_lora_ext.kernels.gated_lora.step import StepMap
from vllm_lora_ext.kernels.gated_lora.zeros import slot_zeros
from vllm_lora_ext.routing import GatedSlice

Reduce = Callable[[torch.Tensor], torch.Tensor]
After = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]


class Site:
    """Weights of every slot at one layer, in buffers whose addresses never change. Only those of
    routers (`reserve_routers`) and of scales of the layer's own output (`reserve_rescale`) are made
    when they are needed, so that a server of plain adapters has none.

    Args:
        num_slots: adapters that can be active at once.
        in_features: K, of this rank's shard.
        slice_sizes: N of each slice of the layer's (local) output.
        max_rank: most ranks per slice.
        max_router_rows: most router rows per slice (a threshold head's row is extra).
        dtype, device: of A and B, if the backend keeps them so (`Store.dtype`); routers and heads
            are fp32, so that a narrow type changes no choice.
        backend: what serves the site; by default the best one for the device.
        reduce: where x is a shard: sums a tensor over the ranks (see `sharded`).
        static: whether what runs must not depend on the step's slots (CUDA graphs).
        x_part, y_part: where A and B are both sharded, the columns of x that this rank's A reads,
            or those of y that its B writes; None: all.
        base_NK: the base layer's weight, where A and routers stand below it (`extension`).
    """

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        slice_sizes: Sequence[int],
        max_rank: int,
        max_router_rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: Backend | None = None,
        reduce: Reduce | None = None,
        static: bool = False,
        x_part: slice | None = None,
        y_part: slice | None = None,
        base_NK: torch.Tensor | None = None,
    ) -> None:
        self.slice_sizes = tuple(slice_sizes)
        self.max_rank, self.max_router_rows = max_rank, max_router_rows
        self.backend = backend or best(torch.device(device).type)
        self.store = self.backend.make_store(num_slots, slice_sizes, max_rank, dtype, device)
        self.bt_SRN = self.store.bt_SRN
        self.reduce, self.static = reduce, static
        self.x_part, self.y_part = x_part, y_part
        ranks, self.most_routers = stack(len(self.slice_sizes), max_rank, max_router_rows)
        self.num_rows = ranks + self.most_routers + (STATS if max_router_rows else 0)
        self.extension: Extension | None = None
        if base_NK is not None:
            self.extension = Extension(base_NK, num_slots, ranks, self.most_routers)
        shape = num_slots, ranks, in_features
        self.a_SRK = self.extension.a_SRK if self.extension else slot_zeros(
            shape, self.store.dtype, device
        )  # fmt: skip
        self.router_SGK = torch.zeros(num_slots, 0, in_features, dtype=torch.float32, device=device)
        self.rescale_S2N: torch.Tensor | None = None
        self.plans: list[SlotPlan | None] = [None] * num_slots
        self._reads_rows: set[int] = set()  # slots that read the rows' own numbers
        self._step = StepMap(0)
        self.after: list[After] = []  # who uses the slots in a way of its own, or looks on
        # Of a layer [gate | up] whose op activates too: a name of `codes.ACTIVATIONS`.
        self.activation: str | None = None
        self.prefetches = False  # whether weights are fetched beside the layer's product
        self.following: Site | None = None  # what runs after it, for those that fetch

    @property
    def padded_rank(self) -> int:
        """`max_rank` as a power of two that a tensor core takes."""
        return max(16, 1 << (self.max_rank - 1).bit_length())

    @property
    def fully_sharded(self) -> bool:
        """Whether this rank's B takes the A x of all ranks."""
        return self.x_part is not None or self.y_part is not None

    def own_x(self, x_TK: torch.Tensor) -> torch.Tensor:
        """What this rank's A reads of the op's x."""
        return x_TK if self.x_part is None else x_TK[:, self.x_part]

    def own_y(self, y_TN: torch.Tensor) -> torch.Tensor:
        """What this rank's B writes of the op's y."""
        return y_TN if self.y_part is None else y_TN[:, self.y_part]

    def whole(self, u_TR: torch.Tensor) -> torch.Tensor:
        """This rank's A x, as its B takes it."""
        if not self.fully_sharded:
            return u_TR
        assert self.reduce is not None
        return self.reduce(u_TR)

    @property
    def rows_TC(self) -> torch.Tensor | None:
        """The numbers that come with the step's rows; None where nothing reads them. Captured
        graphs, which may be older than the adapter that does, always have them."""
        return self.step.rows_TC if self.static or self._reads_rows else None

    @property
    def step(self) -> StepMap:
        """The rows of the step at hand."""
        return self._step

    @step.setter
    def step(self, step: StepMap) -> None:
        self._step = step
        self.changed()

    def listen(self, after: After, first: bool = False) -> None:
        """Calls `after` with y, x and u when the op has run on a step that has an adapter.

        u is what the kernels have shrunk, [parts, T, num_rows]; or, where x is a shard, what the
        gates have read, [T, num_rows] summed over the ranks; None where there is neither.

        Args:
            first: before the others that listen.
        """
        self.after.insert(0 if first else len(self.after), after)
        self.changed()

    def forget(self, after: After) -> None:
        """Ends `listen`."""
        self.after.remove(after)
        self.changed()

    def changed(self) -> None:
        """What the backend made of the plans, the step or the hooks holds no more."""
        self.store.changed()

    def reserve_routers(self, rows: int) -> None:
        """Makes room for `rows` routers and heads in every slot; what slots hold stays.

        Args:
            rows: of all slices together; no more than `most_routers` are kept.
        Raises:
            MemoryError: the device has no room for them (nothing has changed).
        """
        slots, had, width = self.router_SGK.shape
        rows = min(rows, self.most_routers)
        if rows <= had:
            return
        try:
            new_SGK = slot_zeros((slots, rows, width), torch.float32, self.router_SGK.device)
        except (RuntimeError, OSError) as error:  # PyTorch's, on every device; the system's
            mib = slots * rows * width * self.router_SGK.itemsize >> 20
            raise MemoryError(f"{mib} MiB for routers") from error
        if not self.store.in_place:
            new_SGK[:, :had] = self.router_SGK
        self.router_SGK = new_SGK
        for slot, plan in enumerate(self.plans):
            if plan is not None and not self.store.in_place:
                router_GK = new_SGK[slot, : len(plan.router_GK)]
                self.plans[slot] = replace(plan, router_GK=router_GK)
        self.store.routers_moved(new_SGK)
        self.changed()

    def reserve_rescale(self) -> None:
        """Makes room for scale and shift of the layer's own output in every slot.

        Raises:
            MemoryError: the device has no room for them (nothing has changed).
        """
        if self.rescale_S2N is not None:
            return
        shape = len(self.a_SRK), 2, sum(self.slice_sizes)
        try:
            self.rescale_S2N = self.router_SGK.new_zeros(shape)
        except RuntimeError as error:  # PyTorch's, on every device
            raise MemoryError(f"{4 * math.prod(shape) >> 20} MiB for scales") from error
        self.store.rescale_made(self.rescale_S2N)

    def clear(self, slot: int) -> None:
        """The slot adds nothing any more. Its weights stay: nothing reads a slot without a plan."""
        if self.plans[slot] is not None:
            self.plans[slot] = None
            self._reads_rows.discard(slot)
            self.store.slot_changed(self, slot)
        self.store.clear(slot)

    def write(self, slot: int, slices: Sequence[GatedSlice | None]) -> None:
        """Puts one adapter into a slot; `None` leaves that slice at the base weights.

        Raises:
            ValueError: a slice does not fit the buffers (the slot is left empty).
        """
        self.clear(slot)
        self.load(slot, self.pack(slices))

    def shapes(self, slices: Sequence[GatedSlice | None]) -> list[Shape]:
        """Shapes and dtypes of the tensors of the slices' packed form, in its order.

        Raises:
            ValueError: a slice does not fit the buffers.
        """
        parts = _present(slices)
        if not parts:
            return []
        for i, s in parts:
            self._check(i, s)
        width, dtype = self.a_SRK.shape[2], self.a_SRK.dtype
        shapes: list[Shape] = [
            ((sum(s.a_RK.shape[0] for _, s in parts), width), dtype),
            ((sum(_num_router_rows(s) for _, s in parts), width), torch.float32),
        ]
        if any(s.rescale is not None for _, s in parts):
            shapes.append(self.rescale_shape)
        return shapes + self.store.shapes(_ranks(parts))

    @property
    def rescale_shape(self) -> Shape:
        """Of an adapter's scale and shift of the layer's own output."""
        return (2, sum(self.slice_sizes)), torch.float32

    def pack(
        self, slices: Sequence[GatedSlice | None], out: Sequence[torch.Tensor] | None = None
    ) -> PackedSite | None:
        """One adapter's part in the form in which a slot holds it; None when it has none.

        Args:
            out: the tensors to fill, as `shapes` says; None: new ones.
        Raises:
            ValueError: a slice does not fit the buffers.
        """
        parts = _present(slices)
        if not parts:
            return None
        if out is None:
            out = [torch.empty(shape, dtype=dtype) for shape, dtype in self.shapes(slices)]
        a_RK, router_GK, *stored = out
        rescaled = any(s.rescale is not None for _, s in parts)
        rescale_2N = stored.pop(0) if rescaled else None
        places = self.store.places(stored, _ranks(parts))
        plans, a_start, g_start, num_ranks = [], 0, 0, len(a_RK)
        for bt_RN, (i, s) in zip(places, parts, strict=True):
            a_stop, g_stop = a_start + len(s.a_RK), g_start + _num_router_rows(s)
            a_RK[a_start:a_stop] = s.a_RK
            _copy_routers(router_GK[g_start:g_stop], s)
            bt_RN.copy_(s.b_NR.t())
            y_start = sum(self.slice_sizes[:i])
            plan = SlicePlan(
                gate=s.gate, y_start=y_start, y_stop=y_start + self.slice_sizes[i],
                a_start=a_start, a_stop=a_stop, router_start=num_ranks + g_start,
                head_at=num_ranks + g_start + s.gate.router_rows, bt_RN=bt_RN,
                bias_G=_own(s.bias_G), head_bias=s.head_bias, logit_bias_G=_own(s.logit_bias_G),
                norm=s.norm and s.norm.map(_own), row_start=s.row_start, rescale=s.rescale,
            ).rescaled_by(rescale_2N)  # fmt: skip
            if s.rescale is not None and plan.rescale is not None:
                plan.rescale.scale_N.copy_(s.rescale.scale_N)
                plan.rescale.shift_N.copy_(s.rescale.shift_N)
            plans.append(plan)
            a_start, g_start = a_stop, g_stop
        packed = PackedSite(
            a_RK=a_RK, router_GK=router_GK, stored=tuple(stored),
            slices=tuple((i, plan) for (i, _), plan in zip(parts, plans, strict=True)),
            shared=shared_gate(plans), plain=is_plain(plans), rescale_2N=rescale_2N,
        )  # fmt: skip
        self.store.describe(stored, len(a_RK), len(router_GK), packed.slices)
        return packed

    def composed_shapes(self, parts: Sequence[Placed]) -> list[Shape]:
        """Shapes and dtypes of the tensors of what `compose` makes, in its order.

        Raises:
            ValueError: the parts do not fit into one slot together.
        """
        return composed_shapes(self, parts)

    def compose(
        self, parts: Sequence[Placed], out: Sequence[torch.Tensor] | None = None
    ) -> PackedSite | None:
        """Several adapters in one slot: what they add, times factors, adds up.

        Args:
            parts: of each adapter, what `pack` made (None: nothing here), a factor for all rows,
                the column of `StepMap.rows_TC` that has a factor for each row (-1: none), and
                the first column of those that its own gates read.
            out: the tensors to fill, as `composed_shapes` says; None: new ones.
        Raises:
            ValueError: they do not fit into one slot together.
        """
        return compose(self, parts, out)

    def load(self, slot: int, packed: PackedSite | None) -> None:
        """Puts what `pack` made into a slot: copies only, and no wait for any of them."""
        self.clear(slot)
        if packed is not None:
            plan = self.plans[slot] = self.hold(slot, packed)
            if plan.columns:
                self._reads_rows.add(slot)
            self.store.slot_changed(self, slot)
            self.store.load(slot, packed.stored)

    def hold(self, slot: int, packed: PackedSite) -> SlotPlan:
        """Copies a slot's weights, where they cannot stay, and says where they stand, without the
        slot adding anything: for blocks of layers that use them in their own way."""
        self.reserve_routers(len(packed.router_GK))  # if it was not done when it was packed
        if self.store.in_place:
            return packed.plan
        if packed.rescale_2N is not None:
            self.reserve_rescale()
            assert self.rescale_S2N is not None
            self.rescale_S2N[slot].copy_(packed.rescale_2N, non_blocking=True)
        self.store.copy(slot, packed)
        router_GK = _copy(self.router_SGK[slot], packed.router_GK)
        if self.extension is not None:
            self.extension.put_routers(slot, router_GK)
        return SlotPlan(
            a_RK=_copy(self.a_SRK[slot], packed.a_RK),
            router_GK=router_GK,
            slices=tuple(self._in_slot(slot, i, plan) for i, plan in packed.slices),
            shared=packed.shared,
            plain=packed.plain,
        )

    def _in_slot(self, slot: int, i: int, plan: SlicePlan) -> SlicePlan:
        bt_RN = self.bt_SRN[i][slot, plan.b_start : plan.b_start + len(plan.bt_RN)]
        rescale_2N = None if self.rescale_S2N is None else self.rescale_S2N[slot]
        plan = replace(plan, bt_RN=bt_RN).rescaled_by(rescale_2N)
        # Kernels read the gate's vectors in the slot's tables; these are in no page-locked memory,
        # and copying them would make the host wait.
        return plan if bt_RN.is_cpu or self.backend.on_device else plan.on(bt_RN.device)

    def _check(self, i: int, s: GatedSlice) -> None:
        rank, router_rows = s.b_NR.shape[1], s.gate.router_rows
        if rank > self.max_rank or router_rows > self.max_router_rows:
            raise ValueError(
                f"slice {i}: rank {rank} of {self.max_rank}, router rows {router_rows} of "
                f"{self.max_router_rows}"
            )
        columns = s.row_start + s.gate.columns if s.gate.columns else 0
        if columns > self.step.columns:
            raise ValueError(
                f"slice {i}: {columns} numbers that come with a row, of {self.step.columns}"
            )
        reads_x = s.gate.source != "none" and not s.gate.columns
        sums = self.reduce is None or self.fully_sharded or self.max_router_rows > 0
        if self.static and reads_x and not sums:
            raise ValueError(f"slice {i}: its gate needs a sum over the ranks that no graph holds")
        if self.extension is not None and s.norm is not None:
            raise ValueError(f"slice {i}: its router reads what no row below the weight has")
        if s.rescale is not None and self.fully_sharded:
            raise ValueError(f"slice {i}: this rank has a part of what would be rescaled")
        want = (self.a_SRK.shape[2], self.slice_sizes[i])
        if (s.a_RK.shape[1], s.b_NR.shape[0]) != want:
            raise ValueError(
                f"slice {i}: in, out are {s.a_RK.shape[1], s.b_NR.shape[0]}, not {want}"
            )


def _present(slices: Sequence[GatedSlice | None]) -> list[tuple[int, GatedSlice]]:
    return [(i, s) for i, s in enumerate(slices) if s is not None]


def _ranks(parts: Sequence[tuple[int, GatedSlice]]) -> list[tuple[int, int]]:
    return [(i, s.b_NR.shape[1]) for i, s in parts]


def _copy(slot_RK: torch.Tensor, packed_RK: torch.Tensor) -> torch.Tensor:
    """The rows of a slot that now hold `packed_RK`."""
    rows = slot_RK[: len(packed_RK)]
    return rows.copy_(packed_RK, non_blocking=True) if len(packed_RK) else rows


def _num_router_rows(s: GatedSlice) -> int:
    return (0 if s.router_GK is None else len(s.router_GK)) + int(s.head_K is not None)


def _copy_routers(out_GK: torch.Tensor, s: GatedSlice) -> None:
    """Routers, then the head."""
    if s.router_GK is not None:
        out_GK[: len(s.router_GK)] = s.router_GK
    if s.head_K is not None:
        out_GK[-1] = s.head_K


def _own(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().clone()
