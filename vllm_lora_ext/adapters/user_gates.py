"""RecLoRA: LoRA weights that a recommender's user vector makes out of a bank of experts.

    A_u = sum_m g_m A_m    B_u = sum_m g_m B_m    y = W x + alpha/r · B_u A_u x       g = g(u)

A product of two mixtures, not a mixture of products: for one user it is an ordinary LoRA of one
expert's rank. Where g also reads the token, the adapter of a user is a routed one.
Zhu et al., "Lifelong Personalized Low-Rank Adaptation of Large Language Models for
Recommendation", https://arxiv.org/abs/2408.03533.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Protocol

import torch
from torch.nn import functional

from vllm_lora_ext.adapters.checks import check_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.template import Pooling, given
from vllm_lora_ext.routing import GateSpec, InputNorm

EPS = 1e-5  # of every LayerNorm


@dataclass(frozen=True)
class Linear:
    """weight [out, in], bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Norm:
    """LayerNorm with weight and bias [in]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


class Logits(Protocol):
    """A gate's logits [M] of a user [N]."""

    def __call__(self, user_N: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Perceptron:
    """The default gate: Linear(relu(Linear(LayerNorm(u))))."""

    norm: Norm
    first: Linear
    second: Linear

    def __call__(self, user_N: torch.Tensor) -> torch.Tensor:
        return self.second(functional.relu(self.first(self.norm(user_N))))


@dataclass(frozen=True)
class Attention:
    """The gate `lora`: how well the user fits what each expert's own weights say of it.

    Args:
        keys_MN: the experts' keys, which do not depend on the user.
    """

    keys_MN: torch.Tensor
    query: Linear
    first: Linear
    second: Linear
    out: Linear

    def __call__(self, user_N: torch.Tensor) -> torch.Tensor:
        query_MN = self.query(user_N).expand_as(self.keys_MN)
        difference, product = query_MN - self.keys_MN, query_MN * self.keys_MN
        h = torch.cat([query_MN, self.keys_MN, difference, product], dim=-1)
        h = functional.relu(self.second(functional.relu(self.first(h))))
        logits_M = self.out(h)[:, 0]
        return logits_M - logits_M.max()


@dataclass(frozen=True)
class Weighting:
    """From logits to the experts' weights: a softmax, and its square root, if at all."""

    softmax: bool
    root: bool
    temperature: float

    def __call__(self, logits_M: torch.Tensor) -> torch.Tensor:
        if not self.softmax:
            return logits_M
        g_M = torch.softmax(logits_M / self.temperature, dim=-1)
        return g_M.sqrt() if self.root else g_M

    def gate(self, blocks: tuple[int, ...]) -> GateSpec:
        """The same as a row of the gate table, over a token's logits."""
        return GateSpec(
            source="router", normalise="layer", normalise_eps=EPS, blocks=blocks, product=True,
            score="softmax" if self.softmax else "identity",
            score_temperature=self.temperature if self.softmax else 1.0,
            weight="sqrt" if self.softmax and self.root else "score",
        )  # fmt: skip


class UserLayer(Protocol):
    """One adapted layer of a template."""

    @property
    def sizes(self) -> tuple[int, int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def router_rows(self) -> int: ...
    def derive(self, user_N: torch.Tensor) -> RoutedModule: ...


@dataclass(frozen=True)
class Mixture:
    """Experts that are mixed once for a user.

    Args:
        a_QM: [r · in, M], column m the rows of A_m one after the other; b_PM: [r · out, M], column
            m the columns of B_m.
        rank: r; scale: alpha / r.
    """

    a_QM: torch.Tensor
    b_PM: torch.Tensor
    rank: int
    scale: float
    logits: Logits
    weighting: Weighting

    router_rows = 0

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.a_QM) // self.rank, len(self.b_PM) // self.rank

    def weights(self, user_N: torch.Tensor) -> torch.Tensor:
        """g [M]."""
        return self.weighting(self.logits(user_N))

    def derive(self, user_N: torch.Tensor) -> RoutedModule:
        g_M = self.weights(user_N)
        a_RK = (self.a_QM @ g_M).view(self.rank, -1)
        b_RN = (self.b_PM @ (self.scale * g_M)).view(self.rank, -1)
        return RoutedModule(a_RK, b_RN.t().contiguous())


@dataclass(frozen=True)
class TokenMixture:
    """Experts that are mixed for every token by LayerNorm([x, u]) times a matrix.

    The norm's weight is folded into the matrix, and its bias into `bias_M`.

    Args:
        a_RK: [M r, in], b_NR: [out, M r], the scale folded in.
        router_MW: [M, in + N], over [x, u].
    """

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    router_MW: torch.Tensor
    bias_M: torch.Tensor
    weighting: Weighting

    @property
    def sizes(self) -> tuple[int, int]:
        return self.a_RK.shape[1], self.b_NR.shape[0]

    @property
    def rank(self) -> int:
        return self.a_RK.shape[0]

    @property
    def router_rows(self) -> int:
        return self.router_MW.shape[0]

    def derive(self, user_N: torch.Tensor) -> RoutedModule:
        experts = self.router_rows
        return RoutedModule(
            self.a_RK, self.b_NR,
            gate=self.weighting.gate((self.rank // experts,) * experts),
            router_GK=self.router_MW[:, : self.a_RK.shape[1]],
            logit_bias_G=self.bias_M,
            norm=InputNorm.of(self.router_MW, user_N),
        )  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """Mode `finetune`: one LoRA whose ranks and outputs a user scales.

    y = W x + s b(u) * (B (a(u) * (A x))),   a = ranks(c), b = outputs(c), c = hidden(LayerNorm(u))
    """

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    norm: Norm
    hidden: Linear
    ranks: Linear
    outputs: Linear

    router_rows = 0

    @property
    def sizes(self) -> tuple[int, int]:
        return self.a_RK.shape[1], self.b_NR.shape[0]

    @property
    def rank(self) -> int:
        return self.a_RK.shape[0]

    def derive(self, user_N: torch.Tensor) -> RoutedModule:
        c_M = self.hidden(self.norm(user_N))
        a_R, b_N = self.ranks(c_M), self.outputs(c_M)
        return RoutedModule(a_R[:, None] * self.a_RK, b_N[:, None] * self.b_NR)


@dataclass(frozen=True)
class UserTemplate:
    """An adapter for every user vector (`template.Template`)."""

    layers: Mapping[str, UserLayer] = field(repr=False)
    user: int

    instruction = False

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {name: layer.sizes for name, layer in self.layers.items()}

    @property
    def rank(self) -> int:
        return max(layer.rank for layer in self.layers.values())

    @property
    def router_rows(self) -> int:
        return max(layer.router_rows for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(layer) for layer in self.layers.values())

    def derive(self, user: torch.Tensor | None, gate: torch.Tensor | None) -> RoutedAdapter:
        given("instruction", gate, None)
        user_N = given("user", user, self.user)
        modules = {name: layer.derive(user_N) for name, layer in self.layers.items()}
        made = RoutedAdapter(modules, system="reclora")
        check_adapter(made)
        return made

    def pooling(self) -> Pooling:
        raise NotImplementedError("a user's vector comes with the request")


def expert_keys(
    a_QM: torch.Tensor, b_PM: torch.Tensor, first: Linear, second: Linear
) -> torch.Tensor:
    """[M, N] keys of `Attention`, of the experts' weights as they are stored."""
    return second(functional.relu(first(torch.cat([a_QM, b_PM]).t())))


def fold_norm(norm: Norm, linear: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Router [M, in + N] and bias [M] of `TokenMixture`."""
    return linear.weight * norm.weight, linear(norm.bias)


def _nbytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if not is_dataclass(value):
        return 0
    return sum(_nbytes(getattr(value, f.name)) for f in fields(value))
