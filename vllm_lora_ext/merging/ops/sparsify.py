"""Sparsify: which entries of a delta (or core, or factor) stay, and what they are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from vllm_lora_ext.errors import AdapterError

Kind = Literal["none", "magnitude", "random", "della", "outliers"]
Rescale = Literal["none", "density", "l1"]
SMALL = 1 << 20  # up to here torch's own selection is used; it needs 16 bytes per entry


class Mask(NamedTuple):
    """keep [out, in] bool, and the gain of what is kept: a number, or one per entry."""

    keep: torch.Tensor
    gain: float | torch.Tensor

    def apply(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """The thinned-out x, the given rows of the tensor."""
        gain = self.gain if isinstance(self.gain, float) else self.gain[rows]
        return x * self.keep[rows] * gain


@dataclass(frozen=True)
class Sparsity:
    """How one adapter's tensor is thinned out.

    Args:
        kind: `none`; `magnitude`, the largest entries stay (TIES); `random`, Bernoulli (DARE);
            `della`, Bernoulli with chances growing with the magnitude inside a row (DELLA,
            https://arxiv.org/abs/2406.11617); `outliers`, neither the largest `gamma` nor the
            smallest (Model Breadcrumbs, https://arxiv.org/abs/2312.06795).
        density: share that stays, in (0, 1]; 1 keeps everything.
        epsilon: half the range of della's chances, density ± epsilon.
        gamma: share of largest entries that outliers drops.
        rescale: what stays is divided by its chance (`density`), or brought back to the L1 norm
            of the whole (`l1`, mergekit), or left (`none`).
        extra: one more entry stays than int(density · n), the rule of the original TIES code.
        up: density · n is rounded up, as where the dropped ones are counted (MergeLM).
    """

    kind: Kind = "none"
    density: float = 1.0
    epsilon: float = 0.1
    gamma: float = 0.01
    rescale: Rescale = "none"
    extra: bool = False
    up: bool = False


def sparsify(
    x: torch.Tensor,
    how: Sparsity,
    draw: Callable[[], torch.Generator],
    given: torch.Tensor | None = None,
    threshold: float | None = None,
) -> Mask:
    """The mask for a tensor of any shape.

    Args:
        draw: makes the generator; only called by the random kinds.
        given: a stored mask in place of the kind's own.
        threshold: keep |x| >= threshold in place of a share of this tensor: the share was taken
            over many tensors (see `kth_magnitudes`).
    Raises:
        AdapterError: `shape_mismatch` of a given mask.
    """
    chance: float | torch.Tensor = how.density
    if given is not None:
        if given.shape != x.shape:
            raise AdapterError(
                "shape_mismatch", "a stored mask does not fit its tensor", seen=list(given.shape),
                limit=list(x.shape), fix="use the masks of this merge",
            )  # fmt: skip
        keep = given.bool()
        if how.kind == "della" and how.rescale == "density":
            chance = _row_chances(x, how)
    elif how.kind == "none" or how.density >= 1:
        return Mask(torch.ones_like(x, dtype=torch.bool), 1.0)
    elif how.kind == "magnitude":
        count = kept_count(how, x.numel())
        keep = _largest(x, count) if threshold is None else x.abs() >= threshold
    elif how.kind == "outliers":
        keep = _middle(x, how)
    else:
        chance = _row_chances(x, how) if how.kind == "della" else how.density
        keep = torch.rand(x.shape, generator=draw()) < chance
    return Mask(keep, _gain(x, keep, chance, how.rescale))


def _gain(
    x: torch.Tensor, keep: torch.Tensor, chance: float | torch.Tensor, rescale: Rescale
) -> float | torch.Tensor:
    if rescale == "density":
        return 1.0 / chance
    if rescale == "l1":
        left = float(x[keep].abs().sum())
        return float(x.abs().sum()) / left if left > 0 else 1.0
    return 1.0


def kept_count(how: Sparsity, size: int) -> int:
    """How many of `size` entries the magnitude kind keeps."""
    share = how.density * size
    # 1 - (1 - d) is not d.
    return min(math.ceil(share - 1e-6) if how.up else int(share) + how.extra, size)


def _largest(x: torch.Tensor, count: int) -> torch.Tensor:
    if x.numel() <= SMALL or count == 0:
        keep = torch.zeros(x.numel(), dtype=torch.bool)
        keep[torch.topk(x.abs().flatten(), count).indices] = True
        return keep.view(x.shape)
    flat = x.flatten().float()
    (kth,) = kth_magnitudes(lambda: ({0: part} for part in flat.split(SMALL)), [count])
    keep = flat.abs() >= kth
    surplus = int(keep.sum()) - count
    if surplus > 0:  # equal magnitudes: not all of them fit
        keep[(flat.abs() == kth).nonzero()[-surplus:, 0]] = False
    return keep.view(x.shape)


def _middle(x: torch.Tensor, how: Sparsity) -> torch.Tensor:
    size = x.numel()
    top = int(how.gamma * size)
    bottom = size - int(how.density * size) - top
    if bottom < 0:  # more is to stay than gamma leaves: fewer outliers go
        top, bottom = top + bottom, 0
    if size > SMALL:
        # Several times faster than sorting. The last of equal magnitudes counts as the largest.
        flat = x.flatten().flip(0)
        keep = _largest(flat, size - bottom) & ~_largest(flat, top)
        return keep.flip(0).view(x.shape)
    order = torch.sort(x.abs().flatten()).indices
    keep = torch.zeros(size, dtype=torch.bool)
    keep[order[bottom : size - top]] = True
    return keep.view(x.shape)


def _row_chances(x: torch.Tensor, how: Sparsity) -> torch.Tensor:
    """density - epsilon for a row's smallest entry to density + epsilon for its largest."""
    chances, last = [], max(x.shape[-1] - 1, 1)
    places_K = torch.arange(x.shape[-1], dtype=torch.float32)
    for rows in x.reshape(-1, x.shape[-1]).split(256):
        order = rows.abs().argsort(dim=1)
        place = torch.empty(rows.shape).scatter_(1, order, places_K.expand(rows.shape))
        chances.append(how.density - how.epsilon + place / last * 2 * how.epsilon)
    return torch.cat(chances).clamp_(0, 1).view(x.shape)


def kth_magnitudes(
    stream: Callable[[], Iterable[Mapping[int, torch.Tensor]]], counts: Sequence[int]
) -> list[float]:
    """The `counts[i]`-th largest |x| over all tensors of adapter i, exact, in little memory.

    Non-negative floats sort like their bits, so two histograms of half the bits each find it.

    Args:
        stream: yields {i: tensor}; called twice, must yield the same. fp32.
        counts: at least 1 each. 0 comes back where an adapter has fewer entries: all stay.
    """
    high_bins = [torch.zeros(1 << 15, dtype=torch.int64) for _ in counts]
    for tensors in stream():
        for i, x in tensors.items():
            high_bins[i] += torch.bincount(_bits(x) >> 16, minlength=1 << 15)
    found = [_bin_from_top(bins, n) for bins, n in zip(high_bins, counts, strict=True)]
    low_bins = [torch.zeros(1 << 16, dtype=torch.int64) for _ in counts]
    for tensors in stream():
        for i, x in tensors.items():
            bits = _bits(x)
            low = bits[bits >> 16 == found[i][0]] & 0xFFFF
            low_bins[i] += torch.bincount(low, minlength=1 << 16)
    kth = []
    for bins, n, (high, above) in zip(low_bins, counts, found, strict=True):
        low_bin = _bin_from_top(bins, n - above)[0] if high >= 0 else 0
        kth.append(max(high, 0) << 16 | max(low_bin, 0))
    return torch.tensor(kth, dtype=torch.int32).view(torch.float32).tolist()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.abs().contiguous().flatten().view(torch.int32)


def _bin_from_top(bins: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin with the count-th largest entry (-1 when there is none), and how many lie above."""
    above = bins.flip(0).cumsum(0)
    at = int((above < count).sum())
    return len(bins) - 1 - at, int(above[at - 1]) if at else 0
