"""RoutedAdapter: what an adapter *is*, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.adapters.template import Template
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.routing import GateSpec, InputNorm, Rescale

Kind = Literal["linear", "embedding"]
NO_GATE = GateSpec()  # a plain LoRA


@dataclass(frozen=True)
class RoutedModule:
    """One adapted layer: `y += B (g(x) ⊙ (A x))`, every scale already folded into B.

    Args:
        a_RK: [R, in], the experts' A stacked along R (an embedding's A is [R, vocabulary]).
            [R / n, in] when n experts share one A (HydraLoRA): it is stored and computed once.
        b_NR: [out, R], the experts' B side by side, times alpha/r (or alpha/sqrt(r), ...).
        gate: how g is computed; `NO_GATE` for a plain LoRA.
        router_GK: [G, in], for sources `router` and `prototype`.
        bias_G: [G], when gate.bias is not `none`.
        head_K: [in], weight of a learned threshold head; head_bias is its bias.
        logit_bias_G: [G], added to the router's logits before they are scored.
        norm: when gate.normalise is not `none`.
        row_start: first of the numbers that come with each row which the gate reads.
        magnitude_N: [out], of DoRA: `y = m / |W + B A| * (W x + B A x)`, the norm that of each row
            of the weight. Only of linear layers without a gate.
        rescale: what comes of it where the base weights are known (`dora.rescaled`), B scaled too.
        attention_PR: [3 R, R], when gate.source is `attention`: makes q, k and v of A x.
    """

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    gate: GateSpec = NO_GATE
    router_GK: torch.Tensor | None = None
    bias_G: torch.Tensor | None = None
    head_K: torch.Tensor | None = None
    head_bias: float = 0.0
    kind: Kind = "linear"
    logit_bias_G: torch.Tensor | None = None
    norm: InputNorm | None = None
    row_start: int = 0
    magnitude_N: torch.Tensor | None = None
    rescale: Rescale | None = None
    attention_PR: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.b_NR.shape[1]


@dataclass(frozen=True)
class LowRank:
    """`B A`, its scale folded into B: a_RK [R, in], b_NR [out, R]; R stacks the experts'."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor

    @property
    def rank(self) -> int:
        return self.b_NR.shape[1]


@dataclass(frozen=True)
class MixBlock:
    """One MLP block whose experts are mixed after the non-linearity (MixLoRA).

        y = down(a) + sum_e v_e B_d^e A_d^e a_e,   a = sum_e v_e a_e,   v = gate(router x)
        a_e = act(gate(x) + B_g^e A_g^e x) * (up(x) + B_u^e A_u^e x)

    where gate, up and down are the base model's. An MLP without a gate has `up` only:
    a_e = act(up(x) + ...).

    Args:
        gate: how v is computed; source `router`. Its blocks are the experts' ranks.
        router_GK: [E, in], over the block's input.
        parts: linear's name inside the block (`gate_proj`, `up_proj`, `down_proj`; `gate_up_proj`;
            `fc1`, `fc2`) → its experts, ranks stacked in the order of the gate's blocks.
        act: name of the activation as transformers spells it, or None for the model's own.
    """

    gate: GateSpec
    router_GK: torch.Tensor
    parts: dict[str, LowRank] = field(repr=False)
    act: str | None = None

    @property
    def rank(self) -> int:
        return sum(self.gate.blocks)


@dataclass(frozen=True)
class Head:
    """An output layer that was trained as a whole: y = W x + b in place of the base model's.

    Args:
        weight_NK: [labels, in]; bias_N: [labels].
    """

    weight_NK: torch.Tensor
    bias_N: torch.Tensor | None = None


@dataclass(frozen=True)
class FusedExperts:
    """LoRA on a parameter that holds a weight for each of E experts: W_e += B_e A_e.

    Args:
        a_QK: [E * R, in], the experts' A one after the other.
        b_NQ: [out, R * E], times the scale: column r * E + e is rank r of expert e, as PEFT has it.
        count: E.
    """

    a_QK: torch.Tensor
    b_NQ: torch.Tensor
    count: int

    @property
    def rank(self) -> int:
        return self.a_QK.shape[0] // self.count


@dataclass(frozen=True)
class RoutedAdapter:
    """An adapter, fully read and checked.

    Args:
        modules: module name in the Hugging Face model (`model.layers.0.mlp.up_proj`) → its layer.
        blocks: name of an MLP block (`model.layers.0.mlp`) → its experts. A layer may not stand in
            both.
        heads: name of a classification head (`score`) → its weights.
        experts: name of a parameter (`model.layers.0.mlp.experts.gate_up_proj`) → LoRA on it. Such
            an adapter, and one with heads, only a server holds whole (`load_adapter`).
        system: name of the published system (a row of the table of readers), `plain` for LoRA.
        base_model: what the files say they were trained on; may be empty.
        source: the folder, for messages.
        digest: sha256 over the files that were read.
        columns: of what a gate with source `position` or `request` reads: gate i reads column i,
            which says at which tokens it is open.
        template: makes the adapter for a user or an instruction; nothing else is adapted then.
        classifier: gives what gates with source `classifier` read, from the base model's own last
            hidden state of the token: what the adapter adds needs a pass without it first.
    """

    modules: dict[str, RoutedModule] = field(repr=False)
    system: str
    base_model: str = ""
    source: str = ""
    digest: str = ""
    blocks: dict[str, MixBlock] = field(default_factory=dict, repr=False)
    columns: tuple[Column, ...] = ()
    template: Template | None = field(default=None, repr=False)
    heads: dict[str, Head] = field(default_factory=dict, repr=False)
    experts: dict[str, FusedExperts] = field(default_factory=dict, repr=False)
    classifier: Classifier | None = field(default=None, repr=False)

    @property
    def dora(self) -> list[str]:
        """Layers with DoRA's magnitudes, whose output the adapter rescales."""
        return [name for name, m in self.modules.items() if m.magnitude_N is not None]

    @property
    def attends(self) -> list[str]:
        """Layers whose A x attends to that of earlier tokens."""
        return [name for name, m in self.modules.items() if m.gate.source == "attention"]

    @property
    def rank(self) -> int:
        """Largest total rank of a module: what `max_lora_rank` must hold."""
        made = 0 if self.template is None else self.template.rank
        return max((m.rank for m in (*self._gated, *self.experts.values())), default=made)

    @property
    def router_rows(self) -> int:
        """Most rows of a router: what `max_router_rows` must hold."""
        made = 0 if self.template is None else self.template.router_rows
        return max((m.gate.router_rows for m in self._gated), default=made)

    @property
    def _gated(self) -> list[RoutedModule | MixBlock]:
        return [*self.modules.values(), *self.blocks.values()]
