"""Arrow's prototypes: the direction of the input that an expert B A answers most strongly.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs"
(https://arxiv.org/abs/2405.11157): the prototype of an expert is the top right singular vector of
B A, and a token is routed by |prototype · x|. PEFT finds it by a power iteration that is cut off
after 15 steps, so its vector is not the singular vector: it depends on where the iteration starts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

POWER_STEPS = 15
_EPS = 1e-8  # PEFT's, added to every norm


def prototypes(
    experts: Iterable[tuple[torch.Tensor, torch.Tensor]], seed: int | None = None
) -> torch.Tensor:
    """One prototype per expert of a layer.

    Args:
        experts: (A [r, in], B [out, r]) of every expert; B's scale does not matter.
        seed: where PEFT's power iteration starts; None for the exact singular vectors.
    Returns:
        [E, in] fp32, each row of length 1 (0 for an expert that adds nothing).
    """
    if seed is None:
        return torch.stack([svd_prototype(a, b) for a, b in experts])
    return torch.stack([power_prototype(a, b, seed) for a, b in experts])


def power_prototype(a_RK: torch.Tensor, b_NR: torch.Tensor, seed: int) -> torch.Tensor:
    """PEFT 0.21.2's prototype, as it computes it on a CPU: [in] fp32.

    The start is drawn from a generator of its own, seeded anew for every expert and layer: all
    experts of a layer, and all layers of one width, start from the same vector.
    """
    a_RK, b_NR = a_RK.float(), b_NR.float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    v_K = torch.randn(a_RK.shape[1], generator=generator)
    v_K = v_K / (v_K.norm() + _EPS)
    gram_RR = b_NR.T @ b_NR
    for _ in range(POWER_STEPS):
        w_K = a_RK.T @ (gram_RR @ (a_RK @ v_K))
        v_K = w_K / (w_K.norm() + _EPS)
    return v_K


def svd_prototype(a_RK: torch.Tensor, b_NR: torch.Tensor) -> torch.Tensor:
    """The exact top right singular vector of B A: [in] fp32, its largest entry positive.

    NaN when A or B is not finite.
    """
    # B = Q R with orthonormal Q, so R A has the right singular vectors of B A and is small.
    small_RK = torch.linalg.qr(b_NR.double()).R @ a_RK.double()
    if not small_RK.isfinite().all():  # an svd would raise; the adapter's checks say it better
        return torch.full_like(a_RK[0], float("nan"))
    _, sizes, v_RK = torch.linalg.svd(small_RK, full_matrices=False)
    v_K = v_RK[0] * torch.sign(v_RK[0][v_RK[0].abs().argmax()])
    return (v_K if sizes[0] > 0 else torch.zeros_like(v_K)).float()
