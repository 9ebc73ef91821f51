"""Elect: sign by sign, which adapters have a say in the merge of their thinned-out tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Sign = Literal["none", "total", "frequency", "weighted"]
Divide = Literal["none", "voters", "weights", "largest"]
Draw = Callable[[], torch.Tensor]  # makes one adapter's tensor; called more than once


@dataclass(frozen=True)
class Election:
    """How thinned-out tensors x_i become one.

    Args:
        sign: every entry elects a sign, and adapters of the other sign are left out there. By the
            sum of x_i (`total`), of their signs (`frequency`), of w_i x_i (`weighted`), or no
            election (`none`). TIES, https://arxiv.org/abs/2306.01708.
        divide: the sum of w_i x_i is divided by the number of adapters that voted with the
            winner (`voters`), by their weights (`weights`), or not (`none`); `largest` takes the
            entry of largest magnitude in place of the sum. Without an election everybody votes.
        majority: an exactly zero sum takes the sign of most entries (the original TIES code);
            otherwise it counts as positive.
    """

    sign: Sign = "total"
    divide: Divide = "voters"
    majority: bool = False


def merge_entries(
    draws: Sequence[Draw], weights: Sequence[float], how: Election, majority: float | None = None
) -> torch.Tensor:
    """One tensor from many of the same shape, in memory of a few of them however many there are.

    Args:
        draws: one per adapter.
        majority: sign for zero sums when it was counted over more than these tensors; None counts
            it here.
    """
    elected = None
    if how.sign != "none":
        elected = sign_sum(draws, weights, how.sign).sign_()
        if not how.majority:
            majority = 1.0
        elif majority is None:
            majority = float(elected.sum().sign())
        elected[elected == 0] = majority
    shape = draws[0]().shape
    total = torch.zeros(shape)
    votes = torch.zeros(shape) if how.divide in ("voters", "weights") else None
    for draw, weight in zip(draws, weights, strict=True):
        x = draw()
        y, voted = weight * x, None
        if elected is not None:
            # A negative weight turns the vote only where the rule weighs the votes; otherwise it
            # turns what the voter adds.
            voted = (y if how.sign == "weighted" else x).sign() == elected
            y *= voted
        if how.divide == "largest":
            total = torch.where(y.abs() > total.abs(), y, total)
            continue
        total += y
        if votes is not None:
            vote = weight if how.divide == "weights" else 1.0
            votes += vote if voted is None else vote * voted
    return total if votes is None else total / votes.masked_fill(votes.abs() < 1e-8, 1.0)


def sign_sum(draws: Sequence[Draw], weights: Sequence[float], sign: Sign) -> torch.Tensor:
    """What the election counts: its sign wins."""
    total = torch.zeros(draws[0]().shape)
    for draw, weight in zip(draws, weights, strict=True):
        x = draw()
        total += x.sign() if sign == "frequency" else x * (weight if sign == "weighted" else 1.0)
    return total
