"""LoRA-LEGO: the ranks of all adapters are clustered, and every cluster becomes one rank.

Zhao et al. 2024, https://arxiv.org/abs/2409.16167. No code is public: what is fixed here is said in
`cluster_ranks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.concat import concat
from vllm_lora_ext.merging.ops.kmeans import Init, kmeans
from vllm_lora_ext.merging.ops.normalise import balance

Gauge = Literal["balanced", "raw"]
Lengths = Literal["none", "mean", "rms", "max"]


@dataclass(frozen=True)
class Lego:
    """Settings of `cluster_ranks`.

    Args:
        k: ranks of the result at most; None is the largest rank of an input.
        gauge: `balanced` brings every unit to ‖a‖ = ‖b‖ and takes a unit and its negative for the
            same, so the result depends on the deltas' units only; `raw` clusters what is stored.
        parameter: a centroid is shorter than its members; it gets the `mean`, `rms` or `max` of
            their lengths (`none`: it stays).
        output: the delta is multiplied by sqrt(r / k), r the mean rank of the inputs: the sum of k
            independent units grows with sqrt(k).
        init, restarts: see `kmeans`.
    """

    k: int | None = None
    gauge: Gauge = "balanced"
    parameter: Lengths = "none"
    output: bool = False
    init: Init = "farthest"
    restarts: int = 8


class Legoed(NamedTuple):
    """The merged pair, and what the lock file says of it."""

    pair: Pair
    sizes: list[int]  # members per cluster, one per rank of the pair
    inertia: float
    factor: float  # output reweighting, 1 when off


def cluster_ranks(pairs: Sequence[Pair], how: Lego, draw: torch.Generator) -> Legoed:
    """Units (row of A, column of B) of all inputs, k-means on [a; b], centroids as new units.

    Zero units are dropped first and the rest is sorted by length, then content, so neither
    padding nor the order of ranks or adapters matters. With k at least the number of units the
    result is the exact concat.

    Args:
        pairs: weights already in B; at least one unit that is not zero, or rank 0 comes back.
        draw: see `kmeans`.
    """
    live = [_live(pair) for pair in pairs]
    ranks = [pair.rank for pair in live if pair.rank]
    pool = concat(live)
    if not ranks:
        return Legoed(pool, [], 0.0, 1.0)
    if how.gauge == "balanced":
        pool = balance(pool)
    pool = _sorted(pool)
    k = min(how.k or max(ranks), pool.rank)
    if k == pool.rank:
        merged, sizes, inertia = pool, [1] * k, 0.0
    else:
        merged, sizes, inertia = _cluster(pool, k, how, draw)
    factor = math.sqrt(sum(ranks) / len(ranks) / merged.rank) if how.output else 1.0
    return Legoed(Pair(merged.a_RK, merged.b_NR * factor), sizes, inertia, factor)


def _cluster(pool: Pair, k: int, how: Lego, draw: torch.Generator) -> tuple[Pair, list[int], float]:
    a, b = pool.a_RK.double(), pool.b_NR.double()
    gram_PP = a @ a.t() + b.t() @ b
    axial = how.gauge == "balanced"
    found = kmeans(gram_PP, k, draw, how.init, how.restarts, axial)
    member_KP = torch.nn.functional.one_hot(found.label_P, found.clusters).t().double()
    size_K = member_KP.sum(dim=1)
    mix_KP = member_KP * found.sign_P / size_K[:, None]
    if how.parameter != "none":
        length_P = gram_PP.diagonal().clamp(min=0).sqrt()
        wanted_K = _statistic(member_KP, length_P, how.parameter)
        own_K = ((mix_KP @ gram_PP) * mix_KP).sum(dim=1).clamp(min=0).sqrt()
        # Members that cancel leave no direction to stretch.
        usable = own_K > 1e-12 * wanted_K
        mix_KP = mix_KP * torch.where(usable, wanted_K / own_K.clamp(min=1e-300), 1.0)[:, None]
    merged = Pair((mix_KP @ a).float(), (b @ mix_KP.t()).float())
    return merged, [int(n) for n in size_K], found.inertia


def _statistic(member_KP: torch.Tensor, length_P: torch.Tensor, kind: Lengths) -> torch.Tensor:
    if kind == "max":
        return (member_KP * length_P).amax(dim=1)
    power = 2 if kind == "rms" else 1
    return ((member_KP @ length_P**power) / member_KP.sum(dim=1)) ** (1 / power)


def _live(pair: Pair) -> Pair:
    live = pair.a_RK.any(dim=1) & pair.b_NR.any(dim=0)
    return pair if bool(live.all()) else Pair(pair.a_RK[live], pair.b_NR[:, live])


def _sorted(pool: Pair) -> Pair:
    """Longest unit first; equal lengths in the order of their content."""
    units = torch.cat([pool.a_RK, pool.b_NR.t()], dim=1)
    length = units.double().square().sum(dim=1).tolist()
    order = sorted(range(pool.rank), key=lambda p: (-length[p], *units[p, :4].tolist()))
    return Pair(pool.a_RK[order], pool.b_NR[:, order])
