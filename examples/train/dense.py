"""LoRAMoE and HydraLoRA: a softmax router per linear, and every expert answers every token.

LoRAMoE      y = W x + alpha/r · sum_e softmax(R x)_e B_e A_e x
HydraLoRA    the same with one A for all experts
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
    router,
)


class LoRAMoELinear(RoutedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.router = router(linear.in_features)

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return per_rank(self.router(x).softmax(-1))

    def tensors(self, name: str) -> Tensors:
        stem = f"{PREFIX}{name}."
        experts = self.expert_tensors(stem, "lora_A{}.weight", "lora_B{}.weight")
        return experts | {f"{stem}lora_route.weight": self.router.weight}


class HydraLinear(LoRAMoELinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.a_RK = nn.Parameter(self.a_RK[:RANK].detach().clone())

    def project(self, x: torch.Tensor) -> torch.Tensor:
        z = x @ self.a_RK.T
        return torch.cat([z] * EXPERTS, dim=-1)

    def tensors(self, name: str) -> Tensors:
        stem = f"{PREFIX}{name}."
        tensors = {
            f"{stem}lora_A.weight": self.a_RK,
            f"{stem}lora_route.weight": self.router.weight,
        }
        for e, b_NR in enumerate(self.b_NR.chunk(EXPERTS, dim=1)):
            tensors[f"{stem}lora_B{e}.weight"] = b_NR
        return tensors


def _config(depth: int) -> dict[str, object]:
    return {"peft_type": "LORA", "r": RANK, "lora_nums": EXPERTS}


LORAMOE = System(dict.fromkeys((*ATTENTION, *MLP), LoRAMoELinear), _config)
HYDRALORA = System(dict.fromkeys((*ATTENTION, *MLP), HydraLinear), _config)
