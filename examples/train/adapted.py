"""What the training examples share: parts that are learned beside a frozen model, and their folder.

A `System` says which part stands beside which module, and what the authors' files call its
tensors. A part whose gates weigh low-rank projections is one class with one method:

    y = W x + scale · B (gates(x, A x) ⊙ A x)
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

RANK = 4  # of an expert
EXPERTS = 4
ALPHA = 8
PREFIX = "base_model.model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


class Part(nn.Module):
    """What is learned beside one module. `forward(module, x, y)` is the module's new output."""

    def tensors(self, name: str) -> Tensors:
        """The learned tensors as the authors' files call them, of the module `name`."""
        raise NotImplementedError


class RoutedLinear(Part):
    """The experts' A [R, in] and B [out, R] stacked, beside one linear."""

    def __init__(
        self, linear: nn.Linear, *, rank: int = EXPERTS * RANK, scale: float = ALPHA / RANK
    ) -> None:
        super().__init__()
        self.a_RK = nn.Parameter(torch.empty(rank, linear.in_features))
        nn.init.kaiming_uniform_(self.a_RK, a=math.sqrt(5))
        self.b_NR = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scale = scale

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a_RK.T

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What each rank weighs, [..., R], by the input x [..., in] and z = A x."""
        raise NotImplementedError

    def forward(self, linear: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.float()
        z = self.project(x)
        delta = (self.gates(x, z) * z) @ self.b_NR.T
        return y + (self.scale * delta).to(y.dtype)

    def expert_tensors(self, stem: str, a_name: str, b_name: str) -> Tensors:
        """A and B of every expert; `{}` in a name is the expert's number."""
        pairs = zip(self.a_RK.chunk(EXPERTS), self.b_NR.chunk(EXPERTS, dim=1), strict=True)
        return {
            stem + name.format(e): tensor
            for e, pair in enumerate(pairs)
            for name, tensor in zip((a_name, b_name), pair, strict=True)
        }


class PlainLinear(RoutedLinear):
    """One ordinary LoRA, for systems that route elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, rank=RANK)

    def gates(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(z)


def router(width: int, experts: int = EXPERTS, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, experts, bias=bias)


def per_rank(gates_E: torch.Tensor) -> torch.Tensor:
    """Gates of the experts for each of their ranks."""
    return gates_E.repeat_interleave(RANK, dim=-1)


def top_k(scores: torch.Tensor, k: int, key: torch.Tensor | None = None) -> torch.Tensor:
    """The scores with the k largest (by `key`) kept, 0 elsewhere."""
    kept = (scores if key is None else key).topk(k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, kept, scores.gather(-1, kept))


def renormalised(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True)
class System:
    """How one system is trained and saved.

    Args:
        parts: last part of a module's name → the part that stands beside it.
        config: the depth of the model → what adapter_config.json says beside `common`.
        settings: what routing.json says, where the authors' files leave something out.
    """

    parts: Mapping[str, Callable[[nn.Module], Part]]
    config: Callable[[int], dict[str, Any]]
    settings: dict[str, Any] | None = None


class Adapted(nn.Module):
    """A frozen model with a system's parts beside its modules in these layers."""

    def __init__(self, model: nn.Module, system: System, layers: range) -> None:
        super().__init__()
        self.system = system
        self._base = (model,)  # in a tuple: its weights are not ours
        self._off = False
        self.names: list[str] = []
        self.parts = nn.ModuleList()
        for name, module in model.named_modules():
            make = system.parts.get(name.rpartition(".")[2])
            if make and int(name.split(".")[2]) in layers:
                self.names.append(name)
                self.parts.append(make(module))
                module.register_forward_hook(self._hook(self.parts[-1]))

    def _hook(self, part: nn.Module):
        def change(module, args, y):
            return y if self._off else part(module, args[0], y)

        return change

    def get_base_model(self) -> nn.Module:
        return self._base[0]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def save(self, folder: Path, base_name: str) -> None:
        """The adapter as a folder in the authors' own format."""
        tensors: Tensors = {}
        for name, part in zip(self.names, self.parts, strict=True):
            tensors |= part.tensors(name)
        depth = self.get_base_model().config.num_hidden_layers
        config = common(base_name) | self.system.config(depth)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors", metadata={"format": "pt"},
        )  # fmt: skip
        _write(folder / "adapter_config.json", config)
        if self.system.settings is not None:
            _write(folder / "routing.json", self.system.settings)


def common(base_name: str) -> dict[str, Any]:
    """What every system's adapter_config.json says."""
    return {
        "base_model_name_or_path": base_name, "bias": "none", "inference_mode": True,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": [*ATTENTION, *MLP],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2), encoding="utf-8")
