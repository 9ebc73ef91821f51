"""A reward model of many adapters: a router over categories, experts, a network over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class RewardExpert:
    """The LoRA of one capability, as PEFT would save it of the bare model.

    Args:
        tensors: by PEFT's names; config: `adapter_config.json`.
    """

    point: str
    rank: int
    tensors: dict[str, torch.Tensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Head:
    """The network over the experts' last hidden states, of width D.

    Args:
        first_MI: [M, K * D] of K experts; slope: PReLU's, [1] or [M]; second_1M: [1, M].
    """

    first_MI: torch.Tensor
    first_bias_M: torch.Tensor
    slope: torch.Tensor
    second_1M: torch.Tensor
    second_bias: torch.Tensor

    def __call__(self, hidden_KD: torch.Tensor) -> float:
        """The reward of a text: the experts' hidden states in the order of their points, fp32."""
        first = functional.linear(hidden_KD.reshape(-1), self.first_MI, self.first_bias_M)
        second = functional.prelu(first[None], self.slope)[0]
        return float(functional.linear(second, self.second_1M, self.second_bias))


@dataclass(frozen=True)
class Router:
    """The model that picks the category.

    Args:
        weights: of a bare transformers model, as they were saved.
        head_CD: [categories, D] fp32, over the last token's hidden state after the final norm.
    """

    weights: dict[str, torch.Tensor] = field(repr=False)
    head_CD: torch.Tensor
    head_bias_C: torch.Tensor

    def probabilities(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """[B, C] of the hidden states of B texts."""
        return functional.linear(hidden_BD.float(), self.head_CD, self.head_bias_C).softmax(-1)


@dataclass(frozen=True)
class Category:
    """What follows the router's choice.

    Args:
        experts: in the order in which the head takes their hidden states.
        own_base: whether the files hold a base model of this category's own.
    """

    experts: tuple[RewardExpert, ...]
    head: Head
    own_base: bool


@dataclass(frozen=True)
class RewardAdapter:
    """A whole reward model.

    Args:
        names: of all categories, in the order of the router's outputs.
        categories: those that have files.
        source: where it was read; digest: sha256 over what was read.
    """

    names: tuple[str, ...]
    categories: Mapping[str, Category]
    router: Router
    source: str
    digest: str

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.router.head_CD.shape[1]

    @property
    def rank(self) -> int:
        """The largest of an expert."""
        return max(expert.rank for c in self.categories.values() for expert in c.experts)

    def one_base_note(self) -> str:
        """What is to be said where all experts stand on one base model; empty: nothing."""
        own = [name for name, category in self.categories.items() if category.own_base]
        if not own:
            return ""
        return (
            f"the files hold a base model of their own for {', '.join(own)}; one engine has one"
            " base model, so these weights are not used, and the rewards are those of the experts"
            " over the served one"
        )
