"""MoLA and AdaMoLE: a softmax router per linear, and a token has some of the experts.

MoLA       w = the two largest of p = softmax(R x), divided by their sum
AdaMoLE    w = relu(p - t), divided by its sum, with a learned t = sigmoid(h x + c) / experts
"""

from __future__ import annotations

import torch
from torch import nn

from .adapted import (
    ATTENTION,
    EXPERTS,
    MLP,
    PREFIX,
    RANK,
    RoutedLinear,
    System,
    Tensors,
    per_rank,
    renormalised,
    router,
    top_k,
)

K = 2


class MoLALinear(RoutedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.router = router(linear.in_features)

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return per_rank(renormalised(top_k(self.router(x).softmax(-1), K)))

    def tensors(self, name: str) -> Tensors:
        stem = f"{PREFIX}{name}."
        experts = self.expert_tensors(stem, "lora_A_{}.weight", "lora_B_{}.weight")
        return experts | {f"{stem}router.router.weight": self.router.weight}


class AdaMoLELinear(RoutedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.router = router(linear.in_features)
        self.threshold = router(linear.in_features, 1, bias=True)

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        bar = torch.sigmoid(self.threshold(x)) / EXPERTS  # below 1 / experts: one is always above
        return per_rank(renormalised((self.router(x).softmax(-1) - bar).relu()))

    def tensors(self, name: str) -> Tensors:
        stem = f"{PREFIX}{name}."
        experts = self.expert_tensors(stem, "lora_A.{}.weight", "lora_B.{}.weight")
        return experts | {
            f"{stem}lora_gating.weight": self.router.weight,
            f"{stem}lora_threshold.weight": self.threshold.weight,
            f"{stem}lora_threshold.bias": self.threshold.bias,
        }


def _mola(depth: int) -> dict[str, object]:
    return {"peft_type": "LORA", "r": [RANK] * depth}


def _adamole(depth: int) -> dict[str, object]:
    return {
        "peft_type": "ADAMOLE", "lora_rank": RANK, "num_experts": EXPERTS, "max_threshold": None
    }  # fmt: skip


MOLA = System(dict.fromkeys((*ATTENTION, *MLP), MoLALinear), _mola, {"top_k": K})
ADAMOLE = System(dict.fromkeys((*ATTENTION, *MLP), AdaMoLELinear), _adamole)
