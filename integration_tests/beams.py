"""Beam search by transformers."""

from __future__ import annotations

from typing import Any

import torch

from integration_tests.matrix import BASE
from integration_tests.reference_model import logits

WIDTH, STEPS = 3, 4
Beams = list[tuple[list[int], float]]


def apart(got: Beams, want: Beams) -> float:
    """Largest difference of a sum of log-probabilities; infinite where tokens differ."""
    if [tokens for tokens, _ in got] != [tokens for tokens, _ in want]:
        return float("inf")
    return max(abs(a - b) for (_, a), (_, b) in zip(got, want, strict=True))


def by_transformers(prompt: list[int], adapter: Any) -> Beams:
    """Beam search by transformers: the likeliest `WIDTH` continuations of each step go on."""
    kept: Beams = [([], 0.0)]
    for _ in range(STEPS):
        grown = []
        for ids, total in kept:
            row_V = torch.log_softmax(logits(BASE, adapter, prompt + ids)[-1], -1)
            top = row_V.topk(2 * WIDTH)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            grown += [([*ids, token], total + value) for token, value in pairs]
        kept = sorted(grown, key=lambda found: -found[1])[:WIDTH]
    return kept
