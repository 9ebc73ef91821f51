"""k-means from a Gram matrix: points may be long, only their inner products are needed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Init = Literal["farthest", "kmeans++"]
_MAX_STEPS = 1000


class Clusters(NamedTuple):
    """label_P: cluster of every point; sign_P: ±1, how it points relative to its centroid;
    inertia: sum of squared distances to the centroids; clusters: how many, none empty."""

    label_P: torch.Tensor
    sign_P: torch.Tensor
    inertia: float
    clusters: int


def kmeans(
    gram_PP: torch.Tensor, k: int, draw: torch.Generator,
    init: Init = "farthest", restarts: int = 8, axial: bool = False,
) -> Clusters:  # fmt: skip
    """Lloyd's algorithm to convergence, the lowest inertia of several starts.

    Args:
        gram_PP: inner products of the points, fp64.
        k: clusters wanted, 1 to P. Fewer come back when the points have fewer distinct places.
        draw: used by k-means++ (https://dl.acm.org/doi/10.5555/1283383.1283494).
        init: `farthest` starts once from the longest point, each next centre being the point
            farthest from all so far, then `restarts` times with k-means++; `kmeans++` leaves the
            first start out.
        axial: a point and its negative are the same point (a sign that means nothing).
    """
    seeds = [_farthest(gram_PP, k, axial)] if init == "farthest" else []
    seeds += [_plus_plus(gram_PP, k, draw, axial) for _ in range(restarts)]
    best = _lloyd(gram_PP, seeds[0], axial)
    for start in seeds[1:]:
        found = _lloyd(gram_PP, start, axial)
        # A clear gain only: rounding must not choose between equal results.
        if found.inertia < best.inertia * (1 - 1e-9) - 1e-12 * float(gram_PP.trace()):
            best = found
    return best


def _point_distance(gram_PP: torch.Tensor, point: int, axial: bool) -> torch.Tensor:
    inner_P = gram_PP[:, point].abs() if axial else gram_PP[:, point]
    return (gram_PP.diagonal() - 2 * inner_P + gram_PP[point, point]).clamp(min=0)


def _farthest(gram_PP: torch.Tensor, k: int, axial: bool) -> list[int]:
    chosen = [int(gram_PP.diagonal().argmax())]
    nearest_P = _point_distance(gram_PP, chosen[0], axial)
    while len(chosen) < k:
        chosen.append(int(nearest_P.argmax()))
        nearest_P = torch.minimum(nearest_P, _point_distance(gram_PP, chosen[-1], axial))
    return chosen


def _plus_plus(gram_PP: torch.Tensor, k: int, draw: torch.Generator, axial: bool) -> list[int]:
    points = len(gram_PP)
    chosen = [int(torch.randint(points, (), generator=draw))]
    nearest_P = _point_distance(gram_PP, chosen[0], axial)
    for _ in range(k - 1):
        until_P = nearest_P.cumsum(0)
        at = torch.rand((), generator=draw, dtype=torch.float64) * until_P[-1]
        chosen.append(min(int((until_P <= at).sum()), points - 1))
        nearest_P = torch.minimum(nearest_P, _point_distance(gram_PP, chosen[-1], axial))
    return chosen


def _lloyd(gram_PP: torch.Tensor, start: list[int], axial: bool) -> Clusters:
    points = len(gram_PP)
    mix_KP = torch.zeros(len(start), points, dtype=gram_PP.dtype)  # centroids as sums of points
    mix_KP[torch.arange(len(start)), start] = 1.0
    label_P, sign_P = _assign(gram_PP, mix_KP, axial)
    for _ in range(_MAX_STEPS):
        mix_KP = _centroids(label_P, sign_P, len(mix_KP))
        old_P, old_sign_P = label_P, sign_P
        label_P, sign_P = _assign(gram_PP, mix_KP, axial, old_P)
        if torch.equal(label_P, old_P) and torch.equal(sign_P, old_sign_P):
            break
    used, label_P = torch.unique(label_P, return_inverse=True)
    mix_KP = _centroids(label_P, sign_P, len(used))
    own_P = _distances(gram_PP, mix_KP, axial)[0].gather(1, label_P[:, None])
    return Clusters(label_P, sign_P, float(own_P.clamp(min=0).sum()), len(used))


def _centroids(label_P: torch.Tensor, sign_P: torch.Tensor, k: int) -> torch.Tensor:
    member_KP = torch.nn.functional.one_hot(label_P, k).t().to(sign_P.dtype) * sign_P
    return member_KP / member_KP.abs().sum(dim=1, keepdim=True).clamp(min=1)


def _distances(
    gram_PP: torch.Tensor, mix_KP: torch.Tensor, axial: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    inner_PK = gram_PP @ mix_KP.t()
    square_K = (mix_KP @ inner_PK).diagonal()
    near_PK = inner_PK.abs() if axial else inner_PK
    return gram_PP.diagonal()[:, None] - 2 * near_PK + square_K, inner_PK


def _assign(
    gram_PP: torch.Tensor, mix_KP: torch.Tensor, axial: bool, old_P: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    distance_PK, inner_PK = _distances(gram_PP, mix_KP, axial)
    empty_K = mix_KP.abs().sum(dim=1) == 0
    distance_PK = distance_PK.masked_fill(empty_K, torch.inf)
    best_P1, label_P1 = distance_PK.min(dim=1, keepdim=True)
    if old_P is not None:
        # Equal distances keep the old cluster, or rounding could make the loop run in circles.
        slack = 1e-12 * gram_PP.diagonal()[:, None]
        stay = distance_PK.gather(1, old_P[:, None]) <= best_P1 + slack
        label_P1 = torch.where(stay, old_P[:, None], label_P1)
    sign_P1 = torch.where(inner_PK.gather(1, label_P1) < 0, -1.0, 1.0).to(gram_PP.dtype)
    return label_P1[:, 0], sign_P1[:, 0] if axial else torch.ones_like(sign_P1[:, 0])
