"""LayerNorm of what a router reads, as constants of one layer.

    logits = W LayerNorm(z) = (W z - mean(z) · row_sums) / sqrt(var(z) + eps)        z = [x, u]

W z is what a router computes anyway; beside it only the mean and the variance of z are needed, two
numbers per token. u is constant over a request (RecLoRA's user vector) or not there, so that its
part of each sum is a constant too. An affine part belongs into W (gamma) and into the layer's
`logit_bias_G` (W beta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class InputNorm:
    """The constants. They are those of the whole layer, also where x is a shard.

    Args:
        width: numbers in z.
        row_sums_G: [G], each row of W summed over all of z.
        tail_G: [G], W's columns of u times u; None without u.
        tail_sum, tail_squares: of u, and of its squares.
    """

    width: int
    row_sums_G: torch.Tensor
    tail_G: torch.Tensor | None = None
    tail_sum: float = 0.0
    tail_squares: float = 0.0

    @classmethod
    def of(cls, router_GM: torch.Tensor, tail_M: torch.Tensor | None = None) -> InputNorm:
        """From W [G, in + len(u)], whose last columns are those of u (`tail_M`)."""
        w_GM = router_GM.float()
        sums_G, width = w_GM.sum(dim=1), w_GM.shape[1]
        if tail_M is None:
            return cls(width, sums_G)
        u = tail_M.float()
        tail_G = w_GM[:, width - len(u) :] @ u
        return cls(width, sums_G, tail_G, float(u.sum()), float(u.square().sum()))

    def map(self, f: Callable[[torch.Tensor | None], torch.Tensor | None]) -> InputNorm:
        """With f of each tensor in its place; f of None is None."""
        row_sums_G = f(self.row_sums_G)
        assert row_sums_G is not None
        return replace(self, row_sums_G=row_sums_G, tail_G=f(self.tail_G))

    def logits(
        self, wx_TG: torch.Tensor, sum_T: torch.Tensor, squares_T: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """W LayerNorm(z), [T, G] fp32.

        Args:
            wx_TG: W's columns of x times x; sum_T, squares_T: of x, and of its squares.
        """
        mean_T = (sum_T + self.tail_sum) / self.width
        var_T = (squares_T + self.tail_squares) / self.width - mean_T.square()
        std_T1 = (var_T.clamp_min(0) + eps).sqrt()[:, None]
        tail_G = 0 if self.tail_G is None else self.tail_G
        return (wx_TG + tail_G - mean_T[:, None] * self.row_sums_G) / std_T1
