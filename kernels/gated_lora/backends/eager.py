"""The CPU backend: the compiled kernels of `cpu.cpp` where there are any, else PyTorch.

The PyTorch path: rows grouped by slot, one product per slot and launch, gates vectorised. GPUs run
it too where the Triton kernels do not serve (eager only: the groups are Python's, so a captured
graph would freeze them).

No weight is gathered per token. Rows of one slot that lie together are views, not copies, which
is nearly always: vLLM keeps a request's tokens together, and most batches use few adapters.
"""

from __future__ import annotations

import torch

from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native
from vllm_lora_ext.kernels.gated_lora.site import Site, SlicePlan, SlotPlan
from vllm_lora_ext.routing import GateSpec, gate_reference


def gated_lora_(y_TN: torch.Tensor, x_TK: torch.Tensor, site: Site) -> None:
    """Adds the adapters' part to y in place; y is [T, N], x [T, K]."""
    if (native := cpu_native.tables(site, y_TN, x_TK)) is not None:
        return cpu_native.gated_lora_(y_TN, x_TK, site, native)
    for slot, start, stop, index_T in site.step.groups:
        plan = site.plans[slot]
        if plan is None:
            continue
        rows_TK = x_TK[start:stop] if index_T is None else x_TK.index_select(0, index_T)
        h_TR = plan.shrink(rows_TK)
        _gate_(h_TR, plan, h_TR)
        _expand_(y_TN, h_TR, plan, h_TR, start, stop, index_T)


def shrink(x_TK: torch.Tensor, site: Site) -> torch.Tensor:
    """`[A; router] x` of each row's own slot: [T, site.num_rows] fp32, zeros past a slot's rows."""
    u_TR = torch.zeros(x_TK.shape[0], site.num_rows, dtype=torch.float32, device=x_TK.device)
    if (native := cpu_native.tables(site, x_TK)) is not None:
        cpu_native.shrink(u_TR, x_TK, site, native)
        return u_TR
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
    return u_TR


def gate_expand_(y_TN: torch.Tensor, u_TR: torch.Tensor, site: Site, v_TR: torch.Tensor) -> None:
    """Adds `B (g ⊙ Ax)` to y in place: A x from the shrink u, what gates read from v."""
    if (native := cpu_native.tables(site, y_TN, u_TR, v_TR)) is not None:
        return cpu_native.gate_expand_(y_TN, u_TR, v_TR, site, native)
    for slot, start, stop, index_T in site.step.groups:
        plan = site.plans[slot]
        if plan is None:
            continue
        rows = slice(start, stop) if index_T is None else index_T
        h_TR = u_TR[rows, : plan.num_rows].clone()
        inputs_TR = v_TR[rows, : plan.num_rows]
        _gate_(h_TR, plan, inputs_TR)
        _expand_(y_TN, h_TR, plan, inputs_TR, start, stop, index_T)


def _gate_(h_TR: torch.Tensor, plan: SlotPlan, v_TR: torch.Tensor) -> None:
    """Multiplies the A x columns of h by their gates, in place; gates read v."""
    if plan.plain:
        return
    if plan.shared is not None:
        gates, block = plan.shared.num_gates, plan.shared.blocks[0]
        n = len(plan.slices) * gates
        u_TSG = v_TR[:, plan.num_ranks :].unflatten(1, (-1, gates))
        g_TSG = _vector_gate(plan.shared, u_TSG)
        h_TR[:, : plan.num_ranks].unflatten(1, (n, block)).mul_(g_TSG.reshape(-1, n, 1))
        return
    for p in plan.slices:
        if p.gate.source != "none" and not p.shares_a:
            h_TR[:, p.a_start : p.a_stop].mul_(_slice_gate(v_TR, p))


def _slice_gate(v_TR: torch.Tensor, p: SlicePlan) -> torch.Tensor:
    at = p.a_start if p.gate.source == "self" else p.router_start
    u_TG = v_TR[:, at : at + p.gate.num_gates]
    head_T = v_TR[:, p.head_at] + p.head_bias if p.gate.threshold_head else None
    return gate_reference(p.gate, u_TG, p.bias_G, head_T)


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
    plan: SlotPlan,
    v_TR: torch.Tensor,
    start: int,
    stop: int,
    index_T: torch.Tensor | None,
) -> None:
    for p in plan.slices:
        h = h_TR[:, p.a_start : p.a_stop]
        if p.shares_a:  # one Ax for all experts; each has its own gate and its own B
            g_TR = _slice_gate(v_TR, p)
            h = g_TR * h.repeat(1, g_TR.shape[1] // h.shape[1])
        y = y_TN[:, p.y_start : p.y_stop]
        if index_T is not None:
            y.index_add_(0, index_T, torch.mm(h, p.bt_RN.float()).to(y.dtype))
        elif y.dtype is torch.float32:
            y[start:stop].addmm_(h, p.bt_RN.float())
        else:
            y[start:stop].add_(torch.mm(h, p.bt_RN.float()))
