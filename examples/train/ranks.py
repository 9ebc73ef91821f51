"""SMoRA and FlyLoRA: every rank is an expert, and a bias that is balanced, not learned, helps all
of them to be used.

    SMoRA      q = sigmoid(R x) + b;  g = q on its k largest, divided by their sum
    FlyLoRA    no router and a frozen, sparse A: g = 1 on the k largest of A x + d
"""

from __future__ import annotations

import torch
from torch import nn

from .adapted import (
    ALPHA,
    ATTENTION,
    EXPERTS,
    MLP,
    PREFIX,
    RANK,
    RoutedLinear,
    System,
    Tensors,
    renormalised,
    router,
    top_k,
)

R = EXPERTS * RANK
K = R // 2
BALANCE = 1e-3  # how far a step moves the bias of a rank that is used too much, or too little
DENSITY = 0.25  # of FlyLoRA's A
FLY_ALPHA = 4 * ALPHA  # the scale has all ranks in it


class Balanced(RoutedLinear):
    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__(linear, rank=R, scale=scale)
        self.register_buffer("bias_R", torch.zeros(R))

    @torch.no_grad()
    def balance(self, used: torch.Tensor) -> None:
        if self.training:
            load_R = (used != 0).float().flatten(0, -2).mean(0)
            self.bias_R += BALANCE * torch.sign(load_R.mean() - load_R)

    def tensors(self, name: str) -> Tensors:
        stem = f"{PREFIX}{name}."
        return {f"{stem}lora_A.weight": self.a_RK, f"{stem}lora_B.weight": self.b_NR}


class SMoRALinear(Balanced):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, scale=2 * ALPHA)  # the gates of a token sum to 1
        self.router = router(linear.in_features, R)

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gates = renormalised(top_k(torch.sigmoid(self.router(x)) + self.bias_R, K))
        self.balance(gates)
        return gates

    def tensors(self, name: str) -> Tensors:
        stem = f"{PREFIX}{name}."
        return super().tensors(name) | {
            f"{stem}lora_router.weight": self.router.weight, f"{stem}lora_biases": self.bias_R
        }  # fmt: skip


class FlyLinear(Balanced):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, scale=FLY_ALPHA / R)
        kept = torch.rand_like(self.a_RK) < DENSITY
        frozen = torch.randn_like(self.a_RK) * kept / (DENSITY * linear.in_features) ** 0.5
        self.a_RK = nn.Parameter(frozen, requires_grad=False)

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gates = top_k(torch.ones_like(z), K, key=z + self.bias_R)
        self.balance(gates)
        return gates

    def tensors(self, name: str) -> Tensors:
        return super().tensors(name) | {f"{PREFIX}{name}.lora_topk_bias": self.bias_R}


def _smora(depth: int) -> dict[str, object]:
    return {
        "peft_type": "SRMOLE", "r": R, "lora_alpha": 2 * ALPHA, "activate_r": K,
        "rank_partition": 1, "epsilon_greedy": False, "dense_compute": False,
    }  # fmt: skip


def _flylora(depth: int) -> dict[str, object]:
    return {
        "peft_type": "LORA", "r": R, "lora_alpha": FLY_ALPHA, "top_k": K, "bias_u": BALANCE,
        "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip


SMORA = System(dict.fromkeys((*ATTENTION, *MLP), SMoRALinear), _smora)
FLYLORA = System(dict.fromkeys((*ATTENTION, *MLP), FlyLinear), _flylora, {"select": "signed"})
