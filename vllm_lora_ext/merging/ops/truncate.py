"""Truncate: the best approximation of lower rank, and how much of the delta it keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Pair

LOSSLESS_SIDE = 512  # vLLM serves no rank above it
EXACT_SIDE = 1024  # up to here a dense SVD takes less than a second
OVERSAMPLE, ITERATIONS = 32, 8


class Kept(NamedTuple):
    """A pair, and the share of the squared Frobenius norm that it keeps (1 is all)."""

    pair: Pair
    energy: float


def truncate(pair: Pair, rank: int | None = None, energy: float | None = None) -> Kept:
    """The truncated SVD of `B A` by two QRs and the SVD of their small core.

    The dense delta is never formed: with B = Q_b R_b and Aᵀ = Q_a R_a, the singular values of
    R_b R_aᵀ [R, R] are those of B A (Eckart-Young: no pair of this rank is nearer).

    Args:
        rank: largest rank, or None for no limit.
        energy: share of the squared norm to keep, in (0, 1]; the smallest rank that does.
    Returns:
        A and B with sqrt(σ) on both sides, sorted by σ. A pair that fits already and has no
        `energy` to meet comes back as it is.
    """
    if energy is None and (rank is None or pair.rank <= rank):
        return Kept(pair, 1.0)
    if pair.rank == 0:
        return Kept(pair, 1.0)
    u_NR, s_R, vt_RK = svd(pair)
    return _cut(u_NR, s_R, vt_RK, float(s_R.square().sum()), rank, energy)


def svd(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of `B A` without forming it: u_NC [out, C], s_C, vt_CK [C, in], C = min(R, in, out)."""
    qb_NC, rb_CR = torch.linalg.qr(pair.b_NR)
    qa_KC, ra_CR = torch.linalg.qr(pair.a_RK.t())
    u_CC, s_C, vt_CC = torch.linalg.svd(rb_CR @ ra_CR.t(), full_matrices=False)
    return qb_NC @ u_CC, s_C, vt_CC @ qa_KC.t()


def factorise(
    d_NK: torch.Tensor, rank: int | None, energy: float | None, module: str = "the module"
) -> Kept:
    """A pair for a dense delta [out, in].

    Without `rank` and `energy` the pair is the delta itself beside an identity: exact, of rank
    min(out, in). Large matrices are cut by randomised subspace iteration (Halko et al. 2011,
    https://arxiv.org/abs/0909.4061), small ones by the SVD.

    Raises:
        AdapterError: `missing_key`, a large delta without a rank would be no adapter.
    """
    side = min(d_NK.shape)
    if rank is None and (energy is None or side > EXACT_SIDE):
        if side > LOSSLESS_SIDE:
            raise AdapterError(
                "missing_key", f"the merged delta of {module} has full rank: a rank must be given",
                seen=list(d_NK.shape), limit=f"rank 1 to {LOSSLESS_SIDE}",
                fix="add 'rank', or merge in core space",
            )  # fmt: skip
        eye = torch.eye(side)
        wide = d_NK.shape[0] <= d_NK.shape[1]
        return Kept(Pair(d_NK, eye) if wide else Pair(eye, d_NK), 1.0)
    total = float(d_NK.double().square().sum()) if side <= EXACT_SIDE else _square(d_NK)
    if side <= EXACT_SIDE or rank is None or 4 * rank > side:
        u, s, vt = torch.linalg.svd(d_NK, full_matrices=False)
    else:
        u, s, vt = _top(d_NK, rank + OVERSAMPLE)
    return _cut(u, s, vt, total, rank, energy)


def clamped(delta: Pair | torch.Tensor, rank: int, quantile: float) -> Kept:
    """PEFT's `svd_clamp`: entries of U S and of V above this quantile of all of them are cut back.

    The quantile hangs on the signs of the singular vectors, as LAPACK gives them for the dense
    delta, so the detour over factors is not open here. Only the imitation of PEFT asks for it.
    """
    d_NK = delta.delta() if isinstance(delta, Pair) else delta
    u, s, vt = torch.linalg.svd(d_NK, full_matrices=False)
    b_NR, a_RK = u[:, :rank] * s[:rank], vt[:rank]
    limit = float(torch.quantile(torch.cat([b_NR.flatten(), a_RK.flatten()]), quantile))
    pair = Pair(a_RK.clamp(-limit, limit), b_NR.clamp(-limit, limit))
    lost = float((pair.delta() - d_NK).square().sum() / d_NK.square().sum().clamp(min=1e-38))
    return Kept(pair, max(0.0, 1 - lost))


def _top(d_NK: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start = torch.Generator().manual_seed(0)
    q_NC = d_NK @ torch.randn(d_NK.shape[1], width, generator=start)
    for _ in range(ITERATIONS):
        q_NC = torch.linalg.qr(q_NC)[0]
        q_NC = d_NK @ torch.linalg.qr(d_NK.t() @ q_NC)[0]
    q_NC = torch.linalg.qr(q_NC)[0]
    u_CC, s_C, vt_CK = torch.linalg.svd(q_NC.t() @ d_NK, full_matrices=False)
    return q_NC @ u_CC, s_C, vt_CK


def _square(d_NK: torch.Tensor) -> float:
    return sum(float(row_K.double().square().sum()) for row_K in d_NK.split(256))


def _cut(
    u_NC: torch.Tensor, s_C: torch.Tensor, vt_CK: torch.Tensor,
    total: float, rank: int | None, energy: float | None,
) -> Kept:  # fmt: skip
    share_C = s_C.double().square().cumsum(0) / total if total > 0 else torch.ones(len(s_C))
    keep = len(s_C) if rank is None else min(rank, len(s_C))
    if energy is not None:
        # fp32 rounding must not turn "all of it" into one rank too many.
        enough = int((share_C < energy - 1e-7).sum()) + 1
        keep = min(keep, enough)
    if total == 0:
        keep = 0
    root_C = s_C[:keep].sqrt()
    pair = Pair(root_C[:, None] * vt_CK[:keep], u_NC[:, :keep] * root_C)
    kept = min(float(share_C[keep - 1]), 1.0) if keep else 1.0
    return Kept(Pair(pair.a_RK.contiguous(), pair.b_NR.contiguous()), kept)
