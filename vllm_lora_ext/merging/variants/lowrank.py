"""Factors of dense and of oversized deltas, and how far off they are."""

from __future__ import annotations

import torch

from vllm_lora_ext.adapters.readers.tuners import identity_factors
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.concat import concat
from vllm_lora_ext.merging.ops.truncate import factorise, svd, truncate

_ZERO = 1e-7  # relative to the largest singular value: fp32's own noise


def best_rank(delta_NK: torch.Tensor, rank: int) -> tuple[Pair, float]:
    """The best approximation of a dense matrix, and its relative Frobenius error, measured.

    Exact (error 0) when `rank` reaches the smaller side.
    """
    if rank >= min(delta_NK.shape):
        return Pair(*identity_factors(delta_NK)), 0.0
    pair = factorise(delta_NK, rank, None).pair
    whole = float(delta_NK.norm())
    return pair, float((pair.delta() - delta_NK).norm()) / whole if whole else 0.0


def cut(pair: Pair, rank: int) -> tuple[Pair, float]:
    """The best pair of `rank`, and its relative Frobenius error; never the dense matrix."""
    shorter = truncate(pair, rank).pair
    whole = norm(pair)
    off = norm(concat([pair, Pair(shorter.a_RK, -shorter.b_NR)]))
    return shorter, off / whole if whole else 0.0


def drop_zeros(pair: Pair) -> Pair:
    """The same delta at its numerical rank."""
    u, s, vh = svd(Pair(pair.a_RK.double(), pair.b_NR.double()))
    kept = s > _ZERO * s.max()
    root = s[kept].sqrt()
    return Pair((root[:, None] * vh[kept]).float(), (u[:, kept] * root).float())


def norm(pair: Pair) -> float:
    """Frobenius norm of `B A`, from the small core."""
    r_b = torch.linalg.qr(pair.b_NR.double(), mode="r").R
    r_a = torch.linalg.qr(pair.a_RK.double().T, mode="r").R
    return float((r_b @ r_a.T).norm())
