"""RoutedAdapter: what an adapter *is*, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from vllm_lora_ext.routing import GateSpec

Kind = Literal["linear", "embedding"]
NO_GATE = GateSpec()  # a plain LoRA


@dataclass(frozen=True)
class RoutedModule:
    """One adapted layer: `y += B (g(x) ⊙ (A x))`, every scale already folded into B.

    Args:
        a_RK: [R, in], the experts' A stacked along R (an embedding's A is [R, vocabulary]).
        b_NR: [out, R], the experts' B side by side, times alpha/r (or alpha/sqrt(r), ...).
        gate: how g is computed; `NO_GATE` for a plain LoRA.
        router_GK: [G, in], for sources `router` and `prototype`.
        bias_G: [G], when gate.bias is not `none`.
        head_K: [in], weight of a learned threshold head; head_bias is its bias.
    """

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    gate: GateSpec = NO_GATE
    router_GK: torch.Tensor | None = None
    bias_G: torch.Tensor | None = None
    head_K: torch.Tensor | None = None
    head_bias: float = 0.0
    kind: Kind = "linear"

    @property
    def rank(self) -> int:
        return self.a_RK.shape[0]


@dataclass(frozen=True)
class RoutedAdapter:
    """An adapter, fully read and checked.

    Args:
        modules: module name in the Hugging Face model (`model.layers.0.mlp.up_proj`) → its layer.
        system: name of the published system (a row of the table of readers), `plain` for LoRA.
        base_model: what the files say they were trained on; may be empty.
        source: the folder, for messages.
        digest: sha256 over the files that were read.
    """

    modules: dict[str, RoutedModule] = field(repr=False)
    system: str
    base_model: str = ""
    source: str = ""
    digest: str = ""

    @property
    def rank(self) -> int:
        """Largest total rank of a module: what `max_lora_rank` must hold."""
        return max((m.rank for m in self.modules.values()), default=0)

    @property
    def router_rows(self) -> int:
        """Largest number of rows that a module's gate adds to its A."""
        return max((m.gate.router_rows for m in self.modules.values()), default=0)
