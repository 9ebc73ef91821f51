"""WavLLM: a LoRA whose every output is scaled by a gate that an instruction gives.

    V_t = fc_2(gelu(fc_1(h_t)))    g = clamp(relu(sum_t softmax_t(w V_t) V_t), max 3)
    y = W x + g * (B A x)

h is the base model's last hidden state before the final norm, over the instruction alone.
Hu et al., "WavLLM: Towards Robust and Adaptive Speech Large Language Model",
https://arxiv.org/abs/2404.00656.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from vllm_lora_ext.adapters.checks import check_adapter
from vllm_lora_ext.adapters.finite import is_finite
from vllm_lora_ext.adapters.model import LowRank, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.template import given
from vllm_lora_ext.errors import AdapterError

LARGEST = 3.0


@dataclass(frozen=True)
class GateLayers:
    """fc_1 [n, hidden], fc_2 [d, n] and the attention over positions [1, d], with their biases."""

    first: torch.Tensor
    first_bias: torch.Tensor
    second: torch.Tensor
    second_bias: torch.Tensor
    attention: torch.Tensor
    attention_bias: torch.Tensor

    _on: dict[torch.device, list[torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tensors(self) -> list[torch.Tensor]:
        return [self.first, self.first_bias, self.second, self.second_bias, self.attention,
                self.attention_bias]  # fmt: skip

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """They go to a device once: no step but the first of an adapter's waits for that."""
        if device not in self._on:
            self._on[device] = [value.to(device) for value in self.tensors()]
        return self._on[device]


class AttentionPooling:
    """Softmax-weighted mean over positions, kept as a running maximum, sum and weighted sum, so
    that no more than the tokens of one call is ever in memory."""

    def __init__(self, layers: GateLayers) -> None:
        self._layers = layers
        self._seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def add(self, hidden_TK: torch.Tensor) -> None:
        first, first_bias, second, second_bias, weight, bias = self._layers.on(hidden_TK.device)
        h_TN = functional.gelu(functional.linear(hidden_TK.float(), first, first_bias))
        v_TD = functional.linear(h_TN, second, second_bias)
        logits_T = functional.linear(v_TD, weight, bias)[:, 0]
        most_before, sum_before, total_before_D = self._seen or (
            logits_T.new_full((), float("-inf")),
            logits_T.new_zeros(()),
            v_TD.new_zeros(len(second)),
        )
        most = torch.maximum(most_before, logits_T.max())
        kept, share_T = (most_before - most).exp(), (logits_T - most).exp()
        self._seen = most, sum_before * kept + share_T.sum(), total_before_D * kept + share_T @ v_TD

    def gate(self) -> torch.Tensor:
        if self._seen is None:
            raise _not_finite("no token")
        _, sum_, total_D = self._seen
        gate_D = (total_D / sum_).relu().clamp(max=LARGEST).cpu()
        if not is_finite(gate_D):
            raise _not_finite("NaN or infinity")
        return gate_D


def _not_finite(seen: str) -> AdapterError:
    return AdapterError(
        "bad_value", "the gate of this 'instruction' is not finite", seen=seen,
        limit="one token or more, finite hidden states", fix="send another instruction",
    )  # fmt: skip


@dataclass(frozen=True)
class InstructionTemplate:
    """An adapter for every instruction (`template.Template`).

    Args:
        layers: layer → A [r, in] and B [d, r], in the order of the files.
        rotary: those of them whose rows the files have as interleaved pairs per head.
        gate_layers: what the gate is made with.
        head_size: rows per attention head of the base model; None: not known.
    """

    layers: Mapping[str, LowRank] = field(repr=False)
    rotary: frozenset[str]
    gate_layers: GateLayers = field(repr=False)
    head_size: int | None

    user = None
    instruction = True
    router_rows = 0

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {name: (m.a_RK.shape[1], m.b_NR.shape[0]) for name, m in self.layers.items()}

    @property
    def rank(self) -> int:
        return max(layer.rank for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        tensors = [t for m in self.layers.values() for t in (m.a_RK, m.b_NR)]
        tensors += self.gate_layers.tensors()
        return sum(t.numel() * t.element_size() for t in tensors)

    def derive(self, user: torch.Tensor | None, gate: torch.Tensor | None) -> RoutedAdapter:
        given("user", user, None)
        gate_D = given("instruction", gate, self.gate_layers.second.shape[0])
        modules = {}
        for name, layer in self.layers.items():
            b_NR = gate_D[:, None] * layer.b_NR
            if name in self.rotary:
                b_NR = b_NR[rotary_order(len(b_NR), self._head_size())]
            modules[name] = RoutedModule(layer.a_RK, b_NR)
        made = RoutedAdapter(modules, system="wavllm")
        check_adapter(made)
        return made

    def pooling(self) -> AttentionPooling:
        return AttentionPooling(self.gate_layers)

    def _head_size(self) -> int:
        if self.head_size is None:
            raise AdapterError(
                "missing_setting", "'head_size' (rows per attention head of the base model) is in"
                " no file of this adapter, and its rows of q and k are ordered by it",
                fix="serve it, which knows the base model, or add \"head_size\" to routing.json",
            )  # fmt: skip
        return self.head_size


def rotary_order(rows: int, head_size: int) -> torch.Tensor:
    """Where transformers' rows stand in the LLaMA release: of each head, partner j of pair i is row
    2 i + j there, and row j · head_size / 2 + i here."""
    return torch.arange(rows).view(-1, head_size // 2, 2).transpose(1, 2).reshape(-1)
