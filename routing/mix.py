"""Experts mixed after an MLP's non-linearity (MixLoRA), in plain fp32 PyTorch: the specification.

    y = sum_e v_e · expert_e(x)            v = gate(router x)
    expert_e(x) = down(a_e) + B_d^e A_d^e a_e
    a_e = act(gate(x) + B_g^e A_g^e x) * (up(x) + B_u^e A_u^e x)

Li et al. 2024, "MixLoRA", arXiv 2404.15159. An MLP without a gate has a_e = act(up(x) + ...).
A request's scale or span s(t) multiplies what the experts change: base + s (y - base), where base
is down(act(gate(x)) * up(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch

from vllm_lora_ext.routing.reference import gate_reference
from vllm_lora_ext.routing.spec import GateSpec

Linear = Callable[[torch.Tensor], torch.Tensor]


class LowRankPart(Protocol):
    """a_RK [R, in], b_NR [out, R]: the experts' ranks stacked, scale in B."""

    @property
    def a_RK(self) -> torch.Tensor: ...
    @property
    def b_NR(self) -> torch.Tensor: ...


class MixedBlock(Protocol):
    """A gate whose blocks are the experts' ranks, its router [E, in], and the experts' parts."""

    @property
    def gate(self) -> GateSpec: ...
    @property
    def router_GK(self) -> torch.Tensor: ...
    @property
    def parts(self) -> Mapping[str, LowRankPart]: ...


def expert_weights(gate: GateSpec, u_TE: torch.Tensor) -> torch.Tensor:
    """v [T, E] fp32, the weight of every expert, from the router's logits [T, E]."""
    return gate_reference(replace(gate, blocks=(1,) * gate.num_gates), u_TE)


def mix_reference(
    block: MixedBlock, x_TK: torch.Tensor, linears: Mapping[str, Linear], act: Linear
) -> torch.Tensor:
    """Output of the whole MLP block, one expert at a time: [T, hidden] fp32.

    Args:
        x_TK: the block's input, [T, in].
        linears: the base model's linears by name: `gate_proj`, `up_proj`, `down_proj`; or
            `gate_up_proj` (gate first), `down_proj`; or `fc1`, `fc2`.
        act: the activation, elementwise.
    """
    x_TK = x_TK.float()
    v_TE = expert_weights(block.gate, x_TK @ block.router_GK.float().t())
    bounds = [0]
    for rank in block.gate.blocks:
        bounds.append(bounds[-1] + rank)
    y_TN: torch.Tensor | None = None
    for e in range(block.gate.num_gates):
        ranks = slice(bounds[e], bounds[e + 1])

        def run(name: str, h: torch.Tensor, ranks: slice = ranks) -> torch.Tensor:
            out = linears[name](h)
            part = block.parts.get(name)
            if part is not None:
                out = out + h @ part.a_RK[ranks].float().t() @ part.b_NR[:, ranks].float().t()
            return out

        if "fc1" in linears:
            y_e = run("fc2", act(run("fc1", x_TK)))
        elif "gate_up_proj" in linears:
            gate_TI, up_TI = run("gate_up_proj", x_TK).chunk(2, dim=-1)
            y_e = run("down_proj", act(gate_TI) * up_TI)
        else:
            y_e = run("down_proj", act(run("gate_proj", x_TK)) * run("up_proj", x_TK))
        weighted_TN = v_TE[:, e : e + 1] * y_e
        y_TN = weighted_TN if y_TN is None else y_TN + weighted_TN
    assert y_TN is not None  # a gate has experts
    return y_TN
