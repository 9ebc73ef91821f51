"""Rescale: what an adapter makes of a layer's own output, beside what it adds to it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rescale(NamedTuple):
    """`y <- scale * y + shift`, before `B (g ⊙ A x)` is added: DoRA, with the scale folded into B.

    Args:
        scale_N, shift_N: [out] fp32; the shift undoes what the scale does to a bias in y.
    """

    scale_N: torch.Tensor
    shift_N: torch.Tensor

    @classmethod
    def of(cls, scale_N: torch.Tensor, bias_N: torch.Tensor | None) -> Rescale:
        """That scales y without the bias that stands in it; None: it has none."""
        shift_N = torch.zeros_like(scale_N) if bias_N is None else (1 - scale_N) * bias_N.float()
        return cls(scale_N, shift_N)
