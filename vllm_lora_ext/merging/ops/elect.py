"""Elect: sign by sign, which adapters have a say in the merge of their thinned-out tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Sign = Literal["none", "total", "frequency", "weighted", "normfrac", "normmass"]
Divide = Literal["none", "voters", "weights", "largest", "adapters", "median"]
Join = Literal["voters", "all"]
Draw = Callable[[slice], torch.Tensor]  # makes rows of one adapter's tensor, when asked anew
ALL = slice(None)
BLOCK = 1 << 20  # entries that are merged at a time
BY_NORM = ("normfrac", "normmass")  # elections that weigh an entry by its adapter's norm


@dataclass(frozen=True)
class Election:
    """How thinned-out tensors x_i become one.

    Args:
        sign: every entry elects a sign, and adapters of the other sign are left out there. By the
            sum of x_i (`total`), of their signs (`frequency`), of w_i x_i (`weighted`), of their
            signs times their shares of their adapter's squared norm (`normmass`), by the largest
            of these shares alone (`normfrac`), or no election (`none`). TIES,
            https://arxiv.org/abs/2306.01708, and its code.
        divide: the sum of w_i x_i is divided by the number of adapters that voted with the
            winner (`voters`), by their weights (`weights`), by the number of all adapters
            (`adapters`), or not (`none`); `largest` takes the entry of largest magnitude in place
            of the sum, `median` the lower median of all adapters' entries. Without an election
            those vote whose entry is left, and all weights count.
        majority: an exactly zero sum takes the sign of most entries (the original TIES code);
            otherwise it counts as positive.
        join: the entries of those who voted with the winner are merged (`voters`), or all entries
            are, and what comes of them is turned to the elected sign (`all`).
        absent: adapters without these tensors: zeros to `adapters` and `median`.
    """

    sign: Sign = "total"
    divide: Divide = "voters"
    majority: bool = False
    join: Join = "voters"
    absent: int = 0


@dataclass(frozen=True)
class Voters:
    """Whose entries are merged.

    Args:
        draws: their tensors, one per adapter.
        weights: theirs.
        norms: of each adapter's tensors, all of them together.
    """

    draws: Sequence[Draw]
    weights: Sequence[float]
    norms: Sequence[float] = ()


def merge_entries(
    voters: Voters, how: Election, rows: int, width: int, majority: float | None = None
) -> torch.Tensor:
    """One tensor [rows, width] from many, some rows at a time.

    Args:
        majority: sign for zero sums when it was counted over more than these tensors; None counts
            it here.
    """
    blocks = row_blocks(rows, width)
    if how.sign in BY_NORM and not voters.norms:
        voters = replace(voters, norms=norms_of(voters.draws, blocks))
    if how.sign == "none" or not how.majority:
        majority = 1.0
    elif majority is None:
        votes = sum(sign_votes(voters, how.sign, block) for block in blocks)
        majority = float((votes > 0) - (votes < 0))
    merged = torch.empty(rows, width, dtype=voters.draws[0](blocks[0]).dtype)
    for block in blocks:
        merged[block] = _merge_block(voters, how, block, majority)
    return merged


def _merge_block(voters: Voters, how: Election, block: slice, majority: float) -> torch.Tensor:
    elected = None
    if how.sign != "none":
        elected = _sign_sum(voters, how.sign, block).sign_()
        elected[elected == 0] = majority
    if elected is not None and how.join == "all":
        return _merge_voters(voters, how, block, None).abs_() * elected
    return _merge_voters(voters, how, block, elected)


def _merge_voters(
    voters: Voters, how: Election, block: slice, elected: torch.Tensor | None
) -> torch.Tensor:
    if how.divide == "median":
        return _median(voters, how, block, elected)
    total, votes = torch.zeros(()), torch.zeros(())
    for draw, weight in zip(voters.draws, voters.weights, strict=True):
        x = draw(block)
        y = weight * x
        voted = (x != 0).float() if how.divide == "voters" else torch.ones_like(x)
        if elected is not None:
            voted = _agrees(x, y, how, elected)
            y *= voted
        if how.divide == "largest":
            total = torch.where(y.abs() > total.abs(), y, total)
        else:
            total = total + y
            votes = votes + (weight if how.divide == "weights" else 1.0) * voted
    if how.divide in ("none", "largest"):
        return total
    if how.divide == "adapters":
        return total / (len(voters.draws) + how.absent)
    return total / votes.masked_fill(votes.abs() < 1e-8, 1.0)


def _median(
    voters: Voters, how: Election, block: slice, elected: torch.Tensor | None
) -> torch.Tensor:
    entries = []
    for draw, weight in zip(voters.draws, voters.weights, strict=True):
        x = draw(block)
        y = weight * x
        entries.append(y if elected is None else y * _agrees(x, y, how, elected))
    entries += [torch.zeros_like(entries[0])] * how.absent
    return torch.stack(entries).median(dim=0).values


def _agrees(x: torch.Tensor, y: torch.Tensor, how: Election, elected: torch.Tensor) -> torch.Tensor:
    # A negative weight turns the vote only where the rule weighs the votes; otherwise it turns
    # what the voter adds.
    return ((y if how.sign == "weighted" else x).sign() == elected).float()


def sign_votes(voters: Voters, sign: Sign, block: slice = ALL) -> float:
    """How many more entries elect plus than minus."""
    return float(_sign_sum(voters, sign, block).sign().sum())


def norms_of(draws: Sequence[Draw], blocks: Sequence[slice]) -> list[float]:
    """The norm of each adapter's tensor."""
    return [math.sqrt(sum(float(draw(b).square().sum()) for b in blocks)) for draw in draws]


def _sign_sum(voters: Voters, sign: Sign, block: slice) -> torch.Tensor:
    total = torch.zeros(())
    for i, (draw, weight) in enumerate(zip(voters.draws, voters.weights, strict=True)):
        x = draw(block)
        if sign in BY_NORM:
            share = x.sign() * (x / (voters.norms[i] or 1.0)).square()
            larger = share.abs() > total.abs()
            total = torch.where(larger, share, total) if sign == "normfrac" else total + share
        else:
            total = total + (
                x.sign() if sign == "frequency" else weight * x if sign == "weighted" else x
            )
    return total


def row_blocks(rows: int, width: int) -> list[slice]:
    """Slices of about `BLOCK` entries that cover all rows."""
    step = max(BLOCK // max(width, 1), 1)
    return [slice(at, at + step) for at in range(0, rows, step)]
