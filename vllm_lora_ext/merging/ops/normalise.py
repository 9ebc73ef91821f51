"""Normalise: one form for all pairs with the same delta."""

from __future__ import annotations

import torch

from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.truncate import svd


def balance(pair: Pair) -> Pair:
    """Every rank with ‖a‖ = ‖b‖; its delta stays. Ranks with a zero side are dropped.

    Computed in fp64: what differs only by the gauge comes out equal to fp32 rounding.
    """
    length_a, length_b = pair.a_RK.double().norm(dim=1), pair.b_NR.double().norm(dim=0)
    live = (length_a > 0) & (length_b > 0)
    ratio = (length_b[live] / length_a[live]).sqrt()
    a_RK = (pair.a_RK[live] * ratio[:, None]).float()
    return Pair(a_RK, (pair.b_NR[:, live] / ratio).float())


def fix_signs(pair: Pair) -> Pair:
    """Every rank with the largest |entry| of its row of A positive."""
    if pair.rank == 0:
        return pair
    largest = pair.a_RK.abs().argmax(dim=1, keepdim=True)
    sign_R = torch.where(pair.a_RK.gather(1, largest)[:, 0] < 0, -1.0, 1.0)
    return Pair(pair.a_RK * sign_R[:, None], pair.b_NR * sign_R)


def normalise(pair: Pair, gauge: str = "svd") -> Pair:
    """The same delta in a fixed form, longest rank first.

    Args:
        gauge: `svd` (orthogonal ranks, sqrt(σ) on both sides: the same for every pair of this
            delta, unless singular values coincide) or `balanced` (ranks stay what they are, with
            ‖a‖ = ‖b‖).
    """
    if gauge == "svd" and pair.rank:
        u_NC, s_C, vt_CK = svd(pair)
        root_C = s_C.sqrt()
        pair = Pair(root_C[:, None] * vt_CK, u_NC * root_C)
    pair = balance(pair)
    order = pair.a_RK.norm(dim=1).argsort(descending=True, stable=True)
    return fix_signs(Pair(pair.a_RK[order], pair.b_NR[:, order]))
