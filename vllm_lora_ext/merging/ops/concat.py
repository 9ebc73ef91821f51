"""Concat: ranks side by side, the exact sum of products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lora_ext.merging.factors import Pair


def concat(pairs: Sequence[Pair]) -> Pair:
    """`Σ B_i A_i` as one pair of rank `Σ R_i`: A's rows stacked, B's columns side by side.

    Args:
        pairs: at least one; a_RK [R_i, in], b_NR [out, R_i] with equal in and out.
    """
    if len(pairs) == 1:
        return pairs[0]
    a_RK = torch.cat([pair.a_RK for pair in pairs], dim=0)
    return Pair(a_RK, torch.cat([pair.b_NR for pair in pairs], dim=1))
