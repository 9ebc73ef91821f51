"""Spaces: where entries of several deltas are compared, and the way back to a pair.

Merges that drop or elect single entries depend on the basis. The full delta is the classic home,
but there the result has full rank; in core and KnOTS space it keeps rank <= Σ R_i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.bases import isotropise, spread
from vllm_lora_ext.merging.ops.elect import Draw

Name = Literal["core", "knots", "knots_v", "factor", "full"]
SIGMA_MIN = 1e-5  # KnOTS drops directions below it


@dataclass(frozen=True)
class Space:
    """Several deltas as tensors that can be merged entry by entry.

    Args:
        parts: part (`core`, `knots`, `delta`, `lora_A`, `lora_B`) → one tensor per adapter.
        back: merged parts → a pair, or the dense delta [out, in] in full space.
        rigid: the way back keeps singular values.
    """

    parts: dict[str, list[Draw]]
    back: Callable[[Mapping[str, torch.Tensor]], Pair | torch.Tensor]
    rigid: bool = False

    def finish(self, merged: Mapping[str, torch.Tensor], iso: bool) -> Pair | torch.Tensor:
        """The way back; `iso` makes the merged singular values their mean."""
        if not iso:
            return self.back(merged)
        if not self.rigid:
            return isotropise(self.back(merged))
        # Before fp32 rounds on the way back: the smallest directions count as much as the largest.
        return self.back({name: spread(part) for name, part in merged.items()})


def core(pairs: Sequence[Pair]) -> Space:
    """Core space: M_i = Uᵀ B_i A_i V [<= Σ R_i squared], U and V the left singular basis of the
    stacked B and the right one of the stacked A. Lossless for each input. Cores are fp64.

    Panariello et al. 2025, https://github.com/apanariello4/core-space-merging.
    """
    pairs = [Pair(pair.a_RK.double(), pair.b_NR.double()) for pair in pairs]
    u_NC = _left_basis(torch.cat([pair.b_NR for pair in pairs], dim=1))
    v_KD = _left_basis(torch.cat([pair.a_RK for pair in pairs], dim=0).t())
    cores = [(u_NC.t() @ pair.b_NR) @ (pair.a_RK @ v_KD) for pair in pairs]
    return Space(
        {"core": [_made(m_CD) for m_CD in cores]},
        lambda merged: Pair(v_KD.t().float().contiguous(), (u_NC @ merged["core"]).float()),
        rigid=True,
    )


def knots(pairs: Sequence[Pair], plain_v: bool = False) -> Space:
    """KnOTS: [D_1 ... D_T] = U S [V_1 ... V_T]; the pieces S V_i [C, in] are merged.

    Factored: with the stacked B = Q [R_1 ... R_T], U is Q times the left basis of the small
    [R_1 A_1 ... R_T A_T], and S V_i = Uᵀ D_i needs no other basis. Both bases come from Gram
    matrices in fp64: no side is longer than Σ R_i, and directions above 1e-6 of the largest are
    as exact as fp32. Largest direction first. Stoica et al. 2024,
    https://github.com/gstoica27/KnOTS.

    Args:
        plain_v: merge the V_i and multiply by S afterwards, as the Core Space repository does.
    """
    b_NR = torch.cat([pair.b_NR for pair in pairs], dim=1)
    square_R, e_RR = torch.linalg.eigh(_gram(b_NR.t()))
    live = square_R > 1e-13 * square_R.max()
    root_C, e_RC = square_R[live].sqrt(), e_RR[:, live]  # Q = B E / root, R = root Eᵀ
    blocks = (root_C[:, None] * e_RC.t()).split([pair.rank for pair in pairs], dim=1)
    gram_CC = sum(
        (r @ _gram(pair.a_RK) @ r.t() for r, pair in zip(blocks, pairs, strict=True)),
        torch.zeros(()),
    )
    square_C, u_CC = (x.flip(-1) for x in torch.linalg.eigh(gram_CC))
    s_C = square_C.clamp(min=0).sqrt()
    keep = s_C > max(SIGMA_MIN, 1e-7 * float(s_C.max()))
    u_CD, s_D = u_CC[:, keep], s_C[keep]
    stretch = s_D if plain_v else torch.ones_like(s_D)
    pieces = [
        (((u_CD / stretch).t() @ r).float()) @ pair.a_RK
        for r, pair in zip(blocks, pairs, strict=True)
    ]
    u_ND = b_NR @ ((e_RC / root_C) @ (u_CD * stretch)).float()
    return Space(
        {"knots": [_made(x_DK) for x_DK in pieces]}, lambda merged: Pair(merged["knots"], u_ND),
        rigid=not plain_v,
    )  # fmt: skip


def factor(pairs: Sequence[Pair], module: str = "the module") -> Space:
    """A and B by themselves. Depends on the gauge: (cA, B/c) merges differently.

    Raises:
        AdapterError: `rank_mismatch`.
    """
    same_rank(pairs, module)
    parts = {
        "lora_A": [_made(pair.a_RK) for pair in pairs],
        "lora_B": [_made(pair.b_NR) for pair in pairs],
    }
    return Space(parts, lambda merged: Pair(merged["lora_A"], merged["lora_B"]))


def full(pairs: Sequence[Pair]) -> Space:
    """The dense deltas [out, in], made anew at every use: only what is asked for is in memory."""
    return Space({"delta": [_dense(pair) for pair in pairs]}, lambda merged: merged["delta"])


def same_rank(pairs: Sequence[Pair], module: str) -> None:
    """Raises AdapterError `rank_mismatch` unless all pairs have one rank."""
    ranks = [pair.rank for pair in pairs]
    if len(set(ranks)) > 1:
        raise AdapterError(
            "rank_mismatch", f"the adapters have different ranks on {module}, and this merge adds"
            " their factors", seen=ranks, limit="one rank",
            fix="merge in core space, or use cat or svd",
        )  # fmt: skip


SPACES: dict[Name, Callable[[Sequence[Pair], str], Space]] = {
    "core": lambda pairs, _: core(pairs),
    "knots": lambda pairs, _: knots(pairs),
    "knots_v": lambda pairs, _: knots(pairs, plain_v=True),
    "factor": factor,
    "full": lambda pairs, _: full(pairs),
}


def _gram(x_RK: torch.Tensor) -> torch.Tensor:
    x_RK = x_RK.double()
    return x_RK @ x_RK.t()


def _left_basis(x_NR: torch.Tensor) -> torch.Tensor:
    """Left singular vectors, by way of a QR: R is much smaller than N."""
    q_NR, r_RR = torch.linalg.qr(x_NR)
    return q_NR @ torch.linalg.svd(r_RR, full_matrices=False)[0]


def _made(tensor: torch.Tensor) -> Draw:
    return lambda rows: tensor[rows]


def _dense(pair: Pair) -> Draw:
    return lambda rows: pair.b_NR[rows] @ pair.a_RK
