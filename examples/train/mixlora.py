"""MixLoRA: the whole MLP block is the expert, with a LoRA of its own on gate, up and down.

    y = sum_e v_e (down(h_e) + s B_d A_d h_e),    v = the two largest of softmax(R x), renormalised
    h_e = act(gate(x) + s B_g A_g x) * (up(x) + s B_u A_u x)

The attention's linears carry one ordinary LoRA each.
"""

from __future__ import annotations

import torch
from torch import nn

from .adapted import (
    ALPHA,
    ATTENTION,
    EXPERTS,
    MLP,
    RANK,
    Part,
    PlainLinear,
    System,
    Tensors,
    renormalised,
    router,
    top_k,
)

K = 2


class MixBlock(Part):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.router = router(mlp.gate_proj.in_features)
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: PlainLinear(getattr(mlp, name)) for name in MLP})
            for _ in range(EXPERTS)
        )

    def forward(self, mlp: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = renormalised(top_k(self.router(x.float()).softmax(-1), K))
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        total = torch.zeros_like(y, dtype=torch.float32)
        for weight, expert in zip(weights.unbind(-1), self.experts, strict=True):
            hidden = mlp.act_fn(expert["gate_proj"](mlp.gate_proj, x, gate))
            hidden = hidden * expert["up_proj"](mlp.up_proj, x, up)
            out = expert["down_proj"](mlp.down_proj, hidden, mlp.down_proj(hidden))
            total = total + weight[..., None] * out.float()
        return total.to(y.dtype)

    def tensors(self, name: str) -> Tensors:
        stem = _stem(name)
        tensors = {f"{stem}.moe_gate.weight": self.router.weight}
        for e, expert in enumerate(self.experts):
            for linear, pair in expert.items():
                tensors |= _pair(f"{stem}.{linear}.experts.{e}", pair)
        return tensors


class AttentionLinear(PlainLinear):
    def tensors(self, name: str) -> Tensors:
        return _pair(_stem(name), self)


def _stem(name: str) -> str:
    return f"mixlora.{name.removeprefix('model.')}"


def _pair(stem: str, part: PlainLinear) -> Tensors:
    return {f"{stem}.lora_A.weight": part.a_RK, f"{stem}.lora_B.weight": part.b_NR}


def _config(depth: int) -> dict[str, object]:
    return {
        "peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": EXPERTS, "top_k": K,
        "r": RANK, "lora_alpha": ALPHA, "act_fn": None,
    }  # fmt: skip


MIXLORA = System({**dict.fromkeys(ATTENTION, AttentionLinear), "mlp": MixBlock}, _config)
