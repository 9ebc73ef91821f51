"""Site: the slot tables of one (fused) linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton.tables import SlotTables
from vllm_lora_ext.kernels.gated_lora.step import StepMap
from vllm_lora_ext.routing import GatedSlice, GateSpec

After = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]


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

    def shrink(self, x_TK: torch.Tensor) -> torch.Tensor:
        """`[A; router] x`, [T, num_rows] fp32, with PyTorch."""
        x_TK = x_TK.float()
        ax_TR = torch.mm(x_TK, self.a_RK.t().float())
        if not len(self.router_GK):
            return ax_TR
        return torch.cat([ax_TR, torch.mm(x_TK, self.router_GK.t())], dim=1)


class Site:
    """Weights of every slot at one layer, in buffers whose addresses never change.

    Args:
        num_slots: adapters that can be active at once.
        in_features: K, of this rank's shard.
        slice_sizes: N of each slice of the layer's (local) output that this rank adds to.
        max_rank: most ranks per slice.
        max_router_rows: most router rows per slice (a threshold head's row is extra).
        dtype, device: of A and B; routers and heads are fp32, so that a narrow type changes no
            choice. On a CPU all are kept in fp32 whatever the model's dtype: small fp32 products
            are two to five times faster there than bf16 ones, and exact.
        y_start: first column of y that this rank adds to (row-parallel layers under TP).
        triton: whether the Triton kernels serve this site; by default on a GPU that has Triton.
            They read `tables`, and the slices of B side by side (`b_SRN`, of which `bt_SRN` are
            views).
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
        y_start: int = 0,
        triton: bool | None = None,
    ) -> None:
        on_cpu = torch.device(device).type == "cpu"
        if triton is None:
            triton = not on_cpu and _has_triton()
        if on_cpu and not triton:
            dtype = torch.float32
        self.slice_sizes = tuple(slice_sizes)
        self.max_rank, self.max_router_rows, self.y_start = max_rank, max_router_rows, y_start
        ranks, routers = (len(self.slice_sizes) * n for n in (max_rank, max_router_rows + 1))
        self.num_rows = ranks + routers
        self.a_SRK = torch.zeros(num_slots, ranks, in_features, dtype=dtype, device=device)
        self.router_SGK = torch.zeros(num_slots, routers, in_features, device=device)
        self.tables: SlotTables | None = None
        if triton:
            self.tables = SlotTables(num_slots, self.slice_sizes, max_rank, device)
            self.b_SRN = torch.zeros(
                num_slots, max_rank, sum(self.slice_sizes), dtype=dtype, device=device
            )
            self.bt_SRN = list(self.b_SRN.split(self.slice_sizes, dim=2))
        else:
            self.bt_SRN = [
                torch.zeros(num_slots, max_rank, n, dtype=dtype, device=device)
                for n in self.slice_sizes
            ]
        self.plans: list[SlotPlan | None] = [None] * num_slots
        self.native: Any = None  # the plans as C++ reads them; None: to be made (again)
        self.shut: Callable[[], None] | None = None  # C++ must not use what it knows of the site
        self._step = StepMap(0)
        # For who uses the slots in a way of its own, or looks on; run after the ops, with the same
        # tensors: `after` (see `listen`), or, where x is a shard, `after_shrink` and
        # `after_expand`.
        self.after: list[After] = []
        self.after_shrink: Callable[[torch.Tensor], None] | None = None
        self.after_expand: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    @property
    def padded_rank(self) -> int:
        """`max_rank` as a power of two that a tensor core takes."""
        return max(16, 1 << (self.max_rank - 1).bit_length())

    @property
    def step(self) -> StepMap:
        """The rows of the step at hand."""
        return self._step

    @step.setter
    def step(self, step: StepMap) -> None:
        self._step = step
        self.changed()

    def listen(self, after: After, first: bool = False) -> None:
        """Calls `after` with y, x and u of the kernels when the op has run on a step that has an
        adapter; `first`: before the others that listen."""
        self.after.insert(0 if first else len(self.after), after)
        self.changed()

    def forget(self, after: After) -> None:
        """Ends `listen`."""
        self.after.remove(after)
        self.changed()

    def changed(self) -> None:
        """What was made of the plans, the step or the hooks for C++ holds no more."""
        if self.shut is not None:
            self.shut()
        self.native = None

    def clear(self, slot: int) -> None:
        """The slot adds nothing any more. Its weights stay: nothing reads a slot without a plan."""
        self.plans[slot] = None
        self.changed()
        if self.tables is not None:
            self.tables.clear(slot)

    def write(self, slot: int, slices: Sequence[GatedSlice | None]) -> None:
        """Puts one adapter into a slot; `None` leaves that slice at the base weights.

        Raises:
            ValueError: a slice does not fit the buffers (the slot is left empty).
        """
        self.clear(slot)
        plan = self.plans[slot] = self.store(slot, slices)
        if plan is not None and self.tables is not None:
            numbers = (i for i, s in enumerate(slices) if s is not None)
            parts = zip(numbers, plan.slices, strict=True)
            self.tables.write(slot, plan.num_ranks, len(plan.router_GK), parts)

    def store(self, slot: int, slices: Sequence[GatedSlice | None]) -> SlotPlan | None:
        """Writes a slot's weights and says where they stand, without the slot adding anything:
        for blocks of layers that use them in their own way. Raises ValueError, as `write`."""
        parts = [(i, s) for i, s in enumerate(slices) if s is not None]
        if not parts:
            return None
        for i, s in parts:
            self._check(i, s)
        a_RK = torch.cat([s.a_RK for _, s in parts])  # a shared A comes once
        routers = [_router_rows(s) for _, s in parts]
        num_routers = sum(map(len, routers))
        plans, a_start, router_start = [], 0, len(a_RK)
        for (i, s), router in zip(parts, routers, strict=True):
            plans.append(self._plan_slice(slot, i, s, a_start, router_start))
            a_start += s.a_RK.shape[0]
            router_start += len(router)
        return SlotPlan(
            a_RK=self.a_SRK[slot, : len(a_RK)].copy_(a_RK),
            router_GK=self.router_SGK[slot, :num_routers].copy_(torch.cat(routers)),
            slices=tuple(plans),
            shared=_shared_gate(plans),
            plain=all(p.gate.source == "none" for p in plans),
        )

    def _check(self, i: int, s: GatedSlice) -> None:
        rank, router_rows = s.b_NR.shape[1], s.gate.router_rows - int(s.gate.threshold_head)
        if rank > self.max_rank or router_rows > self.max_router_rows:
            raise ValueError(
                f"slice {i}: rank {rank} of {self.max_rank}, router rows {router_rows} of "
                f"{self.max_router_rows}"
            )
        want = (self.a_SRK.shape[2], self.slice_sizes[i])
        if (s.a_RK.shape[1], s.b_NR.shape[0]) != want:
            raise ValueError(
                f"slice {i}: in, out are {s.a_RK.shape[1], s.b_NR.shape[0]}, not {want}"
            )

    def _plan_slice(
        self, slot: int, i: int, s: GatedSlice, a_start: int, router_start: int
    ) -> SlicePlan:
        bt_RN = self.bt_SRN[i][slot, : s.b_NR.shape[1]]
        bt_RN.copy_(s.b_NR.t())
        y_start = self.y_start + sum(self.slice_sizes[:i])
        bias_G = None if s.bias_G is None else s.bias_G.float().to(bt_RN.device)
        return SlicePlan(
            gate=s.gate,
            y_start=y_start,
            y_stop=y_start + self.slice_sizes[i],
            a_start=a_start,
            a_stop=a_start + s.a_RK.shape[0],
            router_start=router_start,
            head_at=router_start + s.gate.router_rows - 1,
            bt_RN=bt_RN,
            bias_G=bias_G,
            head_bias=s.head_bias,
        )


def _router_rows(s: GatedSlice) -> torch.Tensor:
    """Routers, then the head; [0, K] for a gate without."""
    rows = [s.a_RK[:0].float()] if s.router_GK is None else [s.router_GK.float()]
    if s.head_K is not None:
        rows.append(s.head_K.float().reshape(1, -1))
    return torch.cat(rows)


def _shared_gate(plans: Sequence[SlicePlan]) -> GateSpec | None:
    """The slices' gate when one view of u holds all their logits and all blocks are equal."""
    gate = plans[0].gate
    same = all(p.gate == gate and p.bias_G is None and not p.shares_a for p in plans)
    if same and gate.router_rows == gate.num_gates > 0 and len(set(gate.blocks)) == 1:
        return gate
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
