"""Several adapters in one slot: their ranks side by side, each with its own gate and factor.

    y += sum_p factor_p · B_p (g_p(x) ⊙ (A_p x))

A factor for all rows is multiplied into B. One that differs by row is a column of
`StepMap.rows_TC`. Adapters without gates and of one such column become one adapter of all their
ranks, which costs what a plain adapter of that rank does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.plan import (
    MAX_GATES,
    PackedSite,
    Shape,
    SlicePlan,
    is_plain,
    shared_gate,
)

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

Placed = tuple[PackedSite | None, float, int, int]  # as for `Site.compose`


@dataclass(frozen=True)
class _Piece:
    """One plan of an adapter, at slice `i`, and what becomes of it."""

    i: int
    plan: SlicePlan
    packed: PackedSite
    scale: float
    factor_at: int
    row_start: int

    @property
    def a_RK(self) -> torch.Tensor:
        return self.packed.a_RK[self.plan.a_start : self.plan.a_stop]

    @property
    def router_GK(self) -> torch.Tensor:
        """Its routers, and the head."""
        start, gate = self.plan.router_start - len(self.packed.a_RK), self.plan.gate
        return self.packed.router_GK[start : start + gate.router_rows + gate.head_rows]

    @property
    def gated(self) -> bool:
        return self.plan.gate.source != "none"

    @property
    def rank(self) -> int:
        return len(self.plan.bt_RN)


_Group = list[_Piece]  # what becomes one plan


def _groups(parts: Sequence[Placed]) -> list[_Group]:
    """The plans, slice by slice."""
    pieces = [
        _Piece(i, plan, packed, scale, factor_at, offset + plan.row_start)
        for packed, scale, factor_at, offset in parts
        if packed is not None and scale != 0
        for i, plan in packed.slices
    ]
    assert all(piece.plan.factor_at < 0 for piece in pieces)

    def key(item: tuple[int, _Piece]) -> tuple[int, bool, int]:
        number, piece = item
        return piece.i, piece.gated, number if piece.gated else piece.factor_at

    groups = groupby(sorted(enumerate(pieces), key=key), key)
    return [[piece for _, piece in group] for _, group in groups]


def _rescaled(parts: Sequence[Placed]) -> torch.Tensor | None:
    """What becomes of the layer's own output. Only one adapter can be at work on it."""
    here = [part for part in parts if part[0] is not None]
    found = [p.rescale_2N for p, *_ in here if p is not None and p.rescale_2N is not None]
    if not found:
        return None
    if len(here) > 1 or here[0][1] != 1.0 or here[0][2] >= 0:
        raise ValueError("what rescales the layer's output stands alone, without a factor")
    return found[0]


def _check(site: Site, groups: Sequence[_Group]) -> None:
    for i in range(len(site.slice_sizes)):
        ranks = [piece.rank for group in groups for piece in group if piece.i == i]
        if sum(ranks) > site.max_rank:
            added = " + ".join(map(str, ranks))
            raise ValueError(f"slice {i}: ranks {added} = {sum(ranks)} of {site.max_rank}")
        gated = sum(group[0].gated for group in groups if group[0].i == i)
        if gated > MAX_GATES:
            raise ValueError(f"slice {i}: adapters with a gate {gated} of {MAX_GATES}")
    rows = sum(len(piece.router_GK) for group in groups for piece in group)
    if rows > site.most_routers:
        raise ValueError(f"router rows {rows} of {site.most_routers}")
    columns = max((_plan_of(group).columns for group in groups), default=0)
    if columns > site.step.columns:
        raise ValueError(f"numbers that come with a row {columns} of {site.step.columns}")


def _ranks(groups: Sequence[_Group]) -> list[tuple[int, int]]:
    return [(group[0].i, sum(piece.rank for piece in group)) for group in groups]


def _plan_of(group: _Group) -> SlicePlan:
    """As the first one's, but for where its numbers stand."""
    first = group[0]
    row_start = first.row_start if first.plan.gate.columns else 0
    return replace(first.plan, row_start=row_start, factor_at=first.factor_at)


def composed_shapes(site: Site, parts: Sequence[Placed]) -> list[Shape]:
    """See `Site.composed_shapes`."""
    groups = _groups(parts)
    _check(site, groups)
    if not groups:
        return []
    pieces = [piece for group in groups for piece in group]
    width, dtype = site.a_SRK.shape[2], site.a_SRK.dtype
    shapes: list[Shape] = [
        ((sum(len(p.a_RK) for p in pieces), width), dtype),
        ((sum(len(p.router_GK) for p in pieces), width), torch.float32),
    ]
    if _rescaled(parts) is not None:
        shapes.append(site.rescale_shape)
    return shapes + site.store.shapes(_ranks(groups))


def compose(
    site: Site, parts: Sequence[Placed], out: Sequence[torch.Tensor] | None
) -> PackedSite | None:
    """See `Site.compose`."""
    shapes = composed_shapes(site, parts)
    if not shapes:
        return None
    if out is None:
        out = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    groups = _groups(parts)
    a_RK, router_GK, *stored = out
    rescale_2N = _rescaled(parts)
    if rescale_2N is not None:
        rescale_2N = stored.pop(0).copy_(rescale_2N)
    places = site.store.places(stored, _ranks(groups))
    slices: list[tuple[int, SlicePlan]] = []
    a_at = g_at = 0
    b_at = [0] * len(site.slice_sizes)  # of each slice
    for bt_RN, group in zip(places, groups, strict=True):
        i, a_start, g_start, b_start = group[0].i, a_at, g_at, b_at[group[0].i]
        for piece in group:
            a_at = _put(a_RK, a_at, piece.a_RK)
            g_at = _put(router_GK, g_at, piece.router_GK)
            b_at[i] += piece.rank
        at = 0
        for piece in group:
            torch.mul(piece.plan.bt_RN, piece.scale, out=bt_RN[at : at + piece.rank])
            at += piece.rank
        plan = _plan_of(group)
        router_start = len(a_RK) + g_start
        slices.append((i, replace(
            plan, a_start=a_start, a_stop=a_at, router_start=router_start,
            head_at=router_start + plan.gate.router_rows, b_start=b_start, bt_RN=bt_RN,
        ).rescaled_by(rescale_2N)))  # fmt: skip
    site.store.describe(stored, len(a_RK), len(router_GK), slices)
    plans = [plan for _, plan in slices]
    return PackedSite(
        a_RK=a_RK, router_GK=router_GK, stored=tuple(stored), slices=tuple(slices),
        shared=shared_gate(plans), plain=is_plain(plans), rescale_2N=rescale_2N,
    )  # fmt: skip


def _put(out_RK: torch.Tensor, at: int, rows_RK: torch.Tensor) -> int:
    out_RK[at : at + len(rows_RK)] = rows_RK
    return at + len(rows_RK)
