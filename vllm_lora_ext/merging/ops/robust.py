"""RobustMerge: thinned-out factors, rescaled rank by rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lora_ext.merging.factors import Pair


def robustmerge(
    pairs: Sequence[Pair], mask_ratio: float, att_ratio: float, fuse_weight: float
) -> Pair:
    """A = f Σ Ã_i and B = f (Σ s_i B̃_i) / Σ s_i, per rank.

    Ã and B̃ keep the largest entries, a share of `mask_ratio`; s_i = Σ|A_i| / Σ|Ã_i| per row of
    A_i, raised to at least the quantile 1 - `att_ratio` of its rows. Zeng et al. 2025,
    https://github.com/AuroraZengfh/RobustMerge (there f is 2).

    Args:
        pairs: of equal shapes, in their own scale.
    """
    a_RK, b_NR = torch.zeros_like(pairs[0].a_RK), torch.zeros_like(pairs[0].b_NR)
    scales_R = torch.zeros(pairs[0].rank)
    for pair in pairs:
        a, b = _thinned(pair.a_RK, mask_ratio), _thinned(pair.b_NR, mask_ratio)
        s_R = _row_scales(pair.a_RK, a, att_ratio)
        a_RK += a
        b_NR += s_R * b
        scales_R += s_R
    # Every scale is at least 1: a row keeps no more than it had.
    return Pair(fuse_weight * a_RK, fuse_weight * b_NR / scales_R)


def _thinned(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """Entries from the int(n · (1 - ratio))-th smallest magnitude up."""
    magnitude = x.abs()
    below = int(x.numel() * (1 - ratio))
    if below == 0:
        return x
    return x * (magnitude >= magnitude.flatten().kthvalue(below).values)


def _row_scales(a_RK: torch.Tensor, thin_RK: torch.Tensor, att_ratio: float) -> torch.Tensor:
    before_R, after_R = a_RK.abs().sum(dim=1), thin_RK.abs().sum(dim=1)
    # A row of which nothing is left says nothing; published code divides by zero there.
    s_R = torch.where(after_R > 0, before_R / after_R.clamp(min=1e-30), torch.ones(()))
    place = min(int(len(s_R) * (1 - att_ratio)), len(s_R) - 1)
    return s_R.clamp(min=float(s_R.sort().values[place]))
