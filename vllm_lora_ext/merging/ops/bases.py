"""Basis merges: whole singular directions are merged, not entries; cheap on small cores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.truncate import svd

NULL = 1e-6  # singular values below this share of the largest carry no direction


def tsv(parts: Sequence[torch.Tensor], keep: float | None = None) -> torch.Tensor:
    """TSV-Merge: every task's top singular directions, made orthogonal across tasks (Procrustes).

    Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081.

    Args:
        parts: [m, n] each, weights already in.
        keep: share of min(m, n) directions per task; None is 1 / number of tasks.
    """
    share = 1.0 / len(parts) if keep is None else keep
    count = int(min(parts[0].shape) * share + 1e-9)
    us, ss, vs = [], [], []
    for part in parts:
        u, s, vt = _live(*torch.linalg.svd(part, full_matrices=False))
        u, s, vt = u[:, :count], s[:count], vt[:count]
        us.append(u)
        ss.append(s)
        vs.append(vt)
    u, vt = _orthogonal(torch.cat(us, dim=1)), _orthogonal(torch.cat(vs, dim=0))
    return (u * torch.cat(ss)) @ vt


def cart(parts: Sequence[torch.Tensor], keep: float, strength: float) -> torch.Tensor:
    """CART: the mean, plus `strength` times the low-rank parts of what each task adds to it.

    Choi et al. 2024, https://arxiv.org/abs/2412.12153.

    Args:
        parts: [m, n] each, weights already in.
        keep: share of min(m, n) directions, rounded up, kept of every difference to the mean.
    """
    mean = torch.stack(list(parts)).mean(dim=0)
    count = math.ceil(min(mean.shape) * keep)
    rest = torch.zeros_like(mean)
    for part in parts:
        u, s, vt = torch.linalg.svd(part - mean, full_matrices=False)
        rest += (u[:, :count] * s[:count]) @ vt[:count]
    return mean + strength * rest


def isotropise(merged: Pair | torch.Tensor) -> Pair | torch.Tensor:
    """Iso-C: all singular values of a delta become their mean. Null directions stay null.

    Marczak et al. 2025, https://arxiv.org/abs/2502.04959.
    """
    if isinstance(merged, torch.Tensor):
        return spread(merged)
    u, s, vt = _live(*svd(merged))
    return Pair(vt, u * s.mean()) if len(s) else merged


def spread(merged: torch.Tensor) -> torch.Tensor:
    """Iso-C of a matrix."""
    u, s, vt = _live(*torch.linalg.svd(merged, full_matrices=False))
    return (u * s.mean()) @ vt if len(s) else merged


def _live(
    u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = s > NULL * s[:1].clamp(min=torch.finfo(s.dtype).tiny)
    return u[:, keep], s[keep], vt[keep]


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns (or rows)."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt
