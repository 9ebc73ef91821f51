"""Layers whose A reads a shard of x, under tensor parallelism: what must be whole, and when.

In a row-parallel layer `A x` and the logits are partial sums. B is linear, so each rank adds B (g ⊙
its own A x) to its own part of y, and the layer's sum over the ranks, which it has without LoRA
too, completes both. Only what a *gate* reads must be whole before: the logits of a router, or the A
x of gates that score it. So a step of the base model or of plain adapters communicates nothing, and
a router its logits, [T, router rows] fp32, and two numbers more if it reads a normalised x. Numbers
that come with the rows are every rank's own. All ranks hold the same bits afterwards: the same
experts.

A graph is captured once for steps of any adapters. What it holds is one of two (`StepMap.frozen`):
nothing is summed, for steps in which no gate reads x (plain adapters, and gates that come with the
rows), or all that a slot could need, [T, `Site.num_rows`]: which columns of u are a row's logits
depends on its slot, and to gather them would be three more launches in a layer, for bytes that do
not count at the sizes of a captured step. Steps too large for any graph run as without. An engine
that keeps no router rows captures the first kind only, and then a slot takes no gate.

Fully sharded LoRA (`Site.fully_sharded`) keeps of every A and B only a part on each rank: in a row-
parallel layer B of a part of y, in all others A of a part of x, so that of those layers, too, A x
and the logits are partial sums. Then B needs A x whole: all of it is summed, for plain rows as
well. (Where vLLM's own layers split A by ranks and gather, this splits it by x and sums: the same
memory and the same number of collectives, of a layer that then has only one form.)
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_lora_ext.kernels.gated_lora.plan import SlotPlan
from vllm_lora_ext.kernels.gated_lora.site import Site

Gated = list[tuple[Any, SlotPlan]]


def may_sum(site: Site) -> bool:
    """Whether it hangs on the step's adapters if something is summed here."""
    return site.reduce is not None and not site.fully_sharded and site.max_router_rows > 0


def gated_lora_(
    y: torch.Tensor, x: torch.Tensor, u_PTR: torch.Tensor | None, site: Site
) -> torch.Tensor | None:
    """Both launches, and between them the sum of what gates read.

    Args:
        u_PTR: the first launch's result, None before it.
    Returns:
        What the gates have read, [T, num_rows]; None, and nothing is done: no gate is there.
    """
    if site.fully_sharded:
        return _fully_(y, x, u_PTR, site)
    frozen = site.step.frozen
    if frozen is None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        frozen = True  # nobody said that there will be no gates
    gated = gated_rows(site) if frozen is None else []
    if not gated and not (frozen and site.max_router_rows):
        return None
    if u_PTR is None:
        u_PTR = site.backend.shrink(x, site)
    u_TR = u_PTR[0] if len(u_PTR) == 1 else u_PTR.sum(dim=0)
    v_TR = gate_inputs(u_TR, gated, site)
    site.backend.expand_(y, u_TR[None], site, v_TR[None])
    return v_TR


def _fully_(
    y: torch.Tensor, x: torch.Tensor, u_PTR: torch.Tensor | None, site: Site
) -> torch.Tensor | None:
    """`gated_lora_` where A x must be whole."""
    plans = [plan for group in site.step.groups if (plan := site.plans[group.slot]) is not None]
    # On a device the slots are not asked: an MLP block may use some in a way of its own.
    width = site.num_rows
    if not site.backend.on_device:
        width = max((plan.num_rows for plan in plans), default=0)
    if not width:
        return None
    if u_PTR is None:
        u_PTR = site.backend.shrink(x, site)
    # In place: an MLP block finds the sums where the first launch has left its parts.
    u_PTR[0, :, :width] = site.whole(u_PTR[:, :, :width].sum(dim=0))
    u_PTR[1:].zero_()
    site.backend.expand_(y, u_PTR[:1], site)
    return u_PTR[0]


def gated_rows(site: Site) -> Gated:
    """The rows of the step whose slot has a gate here that reads x, as an index, and the slot's
    plan."""
    return [
        (slice(start, stop) if index_T is None else index_T, plan)
        for slot, start, stop, index_T in site.step.groups
        if (plan := site.plans[slot]) is not None and plan.num_inputs
    ]


def gate_inputs(u_TR: torch.Tensor, gated: Gated, site: Site) -> torch.Tensor:
    """u with the columns that gates read summed over the ranks; its others are this rank's.

    Args:
        u_TR: [T, `site.num_rows`] fp32, this rank's shrink.
        gated: rows with a gate, of `gated_rows`; none: any row may have one.
    """
    assert site.reduce is not None
    if not gated:
        return site.reduce(u_TR)
    width = max(plan.num_inputs for _, plan in gated)
    sums_TG = u_TR.new_zeros(len(u_TR), width)
    for rows, plan in gated:
        sums_TG[rows, : plan.num_inputs] = torch.cat([u_TR[rows, c] for c in plan.inputs], dim=1)
    sums_TG = site.reduce(sums_TG)
    v_TR = u_TR.clone()
    for rows, plan in gated:
        at = 0
        for c in plan.inputs:
            v_TR[rows, c] = sums_TG[rows, at : at + c.stop - c.start]
            at += c.stop - c.start
    return v_TR
