"""The PyTorch backend: rows grouped by slot, one product per slot and launch, gates vectorised.

CPUs without a compiler run it, and GPUs where the Triton kernels do not serve (eager only: the
groups are Python's, so a captured graph would freeze them).

No weight is gathered per token. Rows of one slot that lie together are views, not copies, which
is nearly always: vLLM keeps a request's tokens together, and most batches use few adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_lora_ext.kernels.gated_lora.backends.base import Filled, Store
from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, Shape, SlicePlan, SlotPlan
from vllm_lora_ext.kernels.gated_lora.zeros import slot_zeros
from vllm_lora_ext.routing import GateSpec, gate_reference

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

on_device = False


class SliceStore(Store):
    """B of each slice in a buffer of its own.

    On a CPU all is kept in fp32 whatever the model's dtype: small fp32 products are two to five
    times faster there than bf16 ones, and exact.
    """

    def __init__(
        self,
        num_slots: int,
        slice_sizes: Sequence[int],
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.in_place = torch.device(device).type == "cpu"
        if self.in_place:
            dtype = torch.float32
        b_SRN = (slot_zeros((num_slots, max_rank, n), dtype, device) for n in slice_sizes)
        super().__init__(dtype, b_SRN)

    def shapes(self, parts: Sequence[Filled]) -> list[Shape]:
        return [((rank, self.bt_SRN[i].shape[2]), self.dtype) for i, rank in parts]

    def places(self, stored: Sequence[torch.Tensor], parts: Sequence[Filled]) -> list[torch.Tensor]:
        return list(stored)

    def copy(self, slot: int, packed: PackedSite) -> None:
        for (i, p), b_RN in zip(packed.slices, packed.stored, strict=True):
            bt_RN = self.bt_SRN[i][slot, p.b_start : p.b_start + len(b_RN)]
            bt_RN.copy_(b_RN, non_blocking=True)


make_store = SliceStore


def warm(sites: Iterable[Site], max_tokens: int, dtype: torch.dtype) -> None:
    """Nothing is compiled here."""


def gated_lora_(y_TN: torch.Tensor, x_TK: torch.Tensor, site: Site) -> None:
    """Adds the adapters' part to y in place; y is [T, N], x [T, K]."""
    for slot, start, stop, index_T in site.step.groups:
        plan = site.plans[slot]
        if plan is None:
            continue
        rows_TK = x_TK[start:stop] if index_T is None else x_TK.index_select(0, index_T)
        h_TR = plan.shrink(rows_TK)
        read = _Read(plan, h_TR, _given(site, plan, len(x_TK), start, stop, index_T))
        _gate_(h_TR, read)
        _expand_(y_TN, h_TR, read, start, stop, index_T)


def shrink(x_TK: torch.Tensor, site: Site, memory: torch.Tensor | None = None) -> torch.Tensor:
    """`[A; router] x` of each row's own slot: [1, T, site.num_rows] fp32, zeros past a slot's
    rows."""
    u_TR = new_shrink(x_TK, site)
    for slot, start, stop, index_T in site.step.groups:
        plan = site.plans[slot]
        if plan is None:
            continue
        rows_TK = x_TK[start:stop] if index_T is None else x_TK.index_select(0, index_T)
        u = plan.shrink(rows_TK)
        if index_T is None:
            u_TR[start:stop, : u.shape[1]] = u
        else:
            u_TR[index_T, : u.shape[1]] = u
    return u_TR[None]


def new_shrink(x_TK: torch.Tensor, site: Site) -> torch.Tensor:
    """Zeros for a shrink of x."""
    return torch.zeros(len(x_TK), site.num_rows, dtype=torch.float32, device=x_TK.device)


def expand_(
    y_TN: torch.Tensor, u_PTR: torch.Tensor, site: Site, v_PTR: torch.Tensor | None = None
) -> None:
    """Adds `B (g ⊙ Ax)` to y in place: A x from the shrink u, what gates read from v."""
    u_TR, v_TR = u_PTR[0], (u_PTR if v_PTR is None else v_PTR)[0]
    for slot, start, stop, index_T in site.step.groups:
        plan = site.plans[slot]
        if plan is None:
            continue
        rows = slice(start, stop) if index_T is None else index_T
        h_TR = u_TR[rows, : plan.num_rows].clone()
        given_TC = _given(site, plan, len(u_TR), start, stop, index_T)
        read = _Read(plan, v_TR[rows, : plan.num_rows], given_TC)
        _gate_(h_TR, read)
        _expand_(y_TN, h_TR, read, start, stop, index_T)


class _Read(NamedTuple):
    """What the gates of some rows of one slot read: of the shrink, and the rows' own numbers."""

    plan: SlotPlan
    v_TR: torch.Tensor
    given_TC: torch.Tensor | None

    def gate(self, p: SlicePlan) -> torch.Tensor:
        """[T, R], of one slice."""
        u_TG = p.logits(self.v_TR, self.plan.stats_at, self.given_TC)
        head_T = self.v_TR[:, p.head_at] + p.head_bias if p.gate.threshold_head else None
        return gate_reference(p.gate, u_TG, p.bias_G, head_T)

    def times_factor_(self, h_TR: torch.Tensor, p: SlicePlan) -> torch.Tensor:
        if p.factor_at >= 0:
            assert self.given_TC is not None
            h_TR.mul_(self.given_TC[:, p.factor_at, None])
        return h_TR


def _given(
    site: Site, plan: SlotPlan, num_rows: int, start: int, stop: int, index_T: torch.Tensor | None
) -> torch.Tensor | None:
    """The numbers that came with the rows; None where nothing in the slot reads them."""
    if not plan.columns:
        return None
    rows_TC = site.step.rows_TC[:num_rows]
    return rows_TC[start:stop] if index_T is None else rows_TC.index_select(0, index_T)


def _gate_(h_TR: torch.Tensor, read: _Read) -> None:
    """Multiplies the A x columns of h by their gates and factors, in place."""
    plan = read.plan
    if plan.plain:
        return
    if plan.shared is not None:
        gates, block = plan.shared.num_gates, plan.shared.blocks[0]
        n = len(plan.slices) * gates
        u_TSG = read.v_TR[:, plan.num_ranks :].unflatten(1, (-1, gates))
        g_TSG = _vector_gate(plan.shared, u_TSG)
        h_TR[:, : plan.num_ranks].unflatten(1, (n, block)).mul_(g_TSG.reshape(-1, n, 1))
        return
    for p in plan.slices:
        if not _one_h(p):
            h = h_TR[:, p.a_start : p.a_stop]
            if p.gate.source != "none":
                h.mul_(read.gate(p))
            read.times_factor_(h, p)


def _one_h(p: SlicePlan) -> bool:
    """Whether all experts have one h in common, each with its own gate and its own B."""
    return p.gate.product or p.shares_a


def _vector_gate(gate: GateSpec, u_TSG: torch.Tensor) -> torch.Tensor:
    """Gates of all slices at once, without bias or head: [T, S, G] for logits [T, S, G].

    The two forms that nearly every routed system uses cost three small ops: a softmax over all
    gates, and top-k followed by a softmax over the kept (which is what renormalising a softmax
    over all comes to). Everything else takes the reference on [T * S, G].
    """
    if gate.mask_below is None and gate.score_temperature == gate.constant == 1.0:
        if (gate.score, gate.select, gate.weight) == ("softmax", "all", "score"):
            return torch.softmax(u_TSG, dim=-1)
        if (gate.select, gate.key) == ("top_k", "signed"):
            if (gate.score, gate.weight) == ("softmax", "renormalise"):
                return _top_k_softmax(u_TSG, gate.k, 1.0)
            if (gate.score, gate.weight) == ("identity", "softmax"):
                return _top_k_softmax(u_TSG, gate.k, gate.temperature)
    g_TR = gate_reference(gate, u_TSG.reshape(-1, gate.num_gates))
    return g_TR[:, :: gate.blocks[0]].view_as(u_TSG)


def _top_k_softmax(u_TSG: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    # A stable sort breaks ties to the lower index, as the reference does; topk does not promise it.
    value_TSG, order_TSG = torch.sort(u_TSG, dim=-1, descending=True, stable=True)
    logits_TSk = value_TSG[..., :k]
    if temperature != 1.0:
        logits_TSk = logits_TSk / temperature
    weight_TSk = torch.softmax(logits_TSk, dim=-1)
    return torch.zeros_like(u_TSG).scatter_(-1, order_TSG[..., :k], weight_TSk)


def _expand_(
    y_TN: torch.Tensor,
    h_TR: torch.Tensor,
    read: _Read,
    start: int,
    stop: int,
    index_T: torch.Tensor | None,
) -> None:
    for p in read.plan.slices:
        h = h_TR[:, p.a_start : p.a_stop]
        if _one_h(p):
            g_TR = read.gate(p)
            if p.gate.product:
                h = (g_TR * h).unflatten(1, (p.gate.num_gates, -1)).sum(dim=1)
            h = read.times_factor_(g_TR * h.repeat(1, g_TR.shape[1] // h.shape[1]), p)
        y = y_TN[:, p.y_start : p.y_stop]
        if p.rescale is not None:
            rows = slice(start, stop) if index_T is None else index_T
            own_TN = y[rows].float() * p.rescale.scale_N + p.rescale.shift_N
            y[rows] = (own_TN + torch.mm(h, p.bt_RN.float())).to(y.dtype)
            continue
        if index_T is not None:
            y.index_add_(0, index_T, torch.mm(h, p.bt_RN.float()).to(y.dtype))
        elif y.dtype is torch.float32:
            y[start:stop].addmm_(h, p.bt_RN.float())
        else:
            y[start:stop].add_(torch.mm(h, p.bt_RN.float()))
