"""Elect: sign by sign, which adapters have a say in the merge of their thinned-out tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Sign = Literal["none", "total", "frequency", "weighted"]
Divide = Literal["none", "voters", "weights", "largest"]
Draw = Callable[[slice], torch.Tensor]  # makes rows of one adapter's tensor, when asked anew
ALL = slice(None)
BLOCK = 1 << 20  # entries that are merged at a time


@dataclass(frozen=True)
class Election:
    """How thinned-out tensors x_i become one.

    Args:
        sign: every entry elects a sign, and adapters of the other sign are left out there. By the
            sum of x_i (`total`), of their signs (`frequency`), of w_i x_i (`weighted`), or no
            election (`none`). TIES, https://arxiv.org/abs/2306.01708.
        divide: the sum of w_i x_i is divided by the number of adapters that voted with the
            winner (`voters`), by their weights (`weights`), or not (`none`); `largest` takes the
            entry of largest magnitude in place of the sum. Without an election those vote whose
            entry is left, and all weights count.
        majority: an exactly zero sum takes the sign of most entries (the original TIES code);
            otherwise it counts as positive.
    """

    sign: Sign = "total"
    divide: Divide = "voters"
    majority: bool = False


def merge_entries(
    draws: Sequence[Draw], weights: Sequence[float], how: Election, rows: int, width: int,
    majority: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """One tensor [rows, width] from many, some rows at a time.

    Args:
        draws: one per adapter.
        majority: sign for zero sums when it was counted over more than these tensors; None counts
            it here.
    """
    blocks = row_blocks(rows, width)
    if how.sign == "none" or not how.majority:
        majority = 1.0
    elif majority is None:
        votes = sum(sign_votes(draws, weights, how.sign, block) for block in blocks)
        majority = float((votes > 0) - (votes < 0))
    merged = torch.empty(rows, width, dtype=draws[0](blocks[0]).dtype)
    for block in blocks:
        merged[block] = _merge_block(draws, weights, how, block, majority)
    return merged


def _merge_block(
    draws: Sequence[Draw], weights: Sequence[float], how: Election, block: slice, majority: float
) -> torch.Tensor:
    elected = None
    if how.sign != "none":
        elected = _sign_sum(draws, weights, how.sign, block).sign_()
        elected[elected == 0] = majority
    total, votes = torch.zeros(()), torch.zeros(())
    for draw, weight in zip(draws, weights, strict=True):
        x = draw(block)
        y = weight * x
        voted = (x != 0).float() if how.divide == "voters" else torch.ones_like(x)
        if elected is not None:
            # A negative weight turns the vote only where the rule weighs the votes; otherwise it
            # turns what the voter adds.
            voted = ((y if how.sign == "weighted" else x).sign() == elected).float()
            y *= voted
        if how.divide == "largest":
            total = torch.where(y.abs() > total.abs(), y, total)
        else:
            total = total + y
            votes = votes + (weight if how.divide == "weights" else 1.0) * voted
    if how.divide in ("none", "largest"):
        return total
    return total / votes.masked_fill(votes.abs() < 1e-8, 1.0)


def sign_votes(
    draws: Sequence[Draw], weights: Sequence[float], sign: Sign, block: slice = ALL
) -> float:
    """How many more entries elect plus than minus."""
    return float(_sign_sum(draws, weights, sign, block).sign().sum())


def _sign_sum(
    draws: Sequence[Draw], weights: Sequence[float], sign: Sign, block: slice
) -> torch.Tensor:
    total = torch.zeros(())
    for draw, weight in zip(draws, weights, strict=True):
        x = draw(block)
        total = total + (
            x.sign() if sign == "frequency" else weight * x if sign == "weighted" else x
        )
    return total


def row_blocks(rows: int, width: int) -> list[slice]:
    """Slices of about `BLOCK` entries that cover all rows."""
    step = max(BLOCK // max(width, 1), 1)
    return [slice(at, at + step) for at in range(0, rows, step)]
