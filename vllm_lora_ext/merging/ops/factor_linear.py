"""Factor-linear: sums of the factors, not of the products. Three tools, three meanings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from vllm_lora_ext.merging.factors import Pair

Mode = Literal["peft", "raw", "b_only"]


def factor_linear(pairs: Sequence[Pair], weights: Sequence[float], mode: Mode) -> Pair:
    """`(Σ β_i B_i) (Σ α_i A_i)`, of the inputs' common rank; cross terms B_i A_j come with it.

    Args:
        pairs: of equal shapes, in the scale that the mode wants (see `sides`).
        weights: one per pair, the adapter's scale included where the mode wants it.
        mode: `peft` (0.7 and later): sgn(t)·sqrt|t| on A, sqrt|t| on B; `raw` (LoRAX, LoraHub):
            the weight on both; `b_only` (LoRA-Soups' linear mode): on B alone.
    """
    sides = [side_weights(weight, mode) for weight in weights]
    a_RK, b_NR = torch.zeros_like(pairs[0].a_RK), torch.zeros_like(pairs[0].b_NR)
    for pair, (alpha, beta) in zip(pairs, sides, strict=True):
        a_RK += alpha * pair.a_RK
        b_NR += beta * pair.b_NR
    return Pair(a_RK, b_NR)


def side_weights(weight: float, mode: Mode) -> tuple[float, float]:
    """What a weight puts on A and on B."""
    if mode == "peft":
        root = math.sqrt(abs(weight))
        return math.copysign(root, weight), root
    return (weight, weight) if mode == "raw" else (1.0, weight)
