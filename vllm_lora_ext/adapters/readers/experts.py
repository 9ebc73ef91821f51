"""Experts stacked in one layer: their config, their number, their matrices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.adapters.readers.names import part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import (
    PeftLora,
    bad_value,
    read_peft_config,
    whole_number,
)
from vllm_lora_ext.errors import AdapterError


def early_peft_config(
    config: dict[str, Any], system: str, also: Collection[str] = (), accepted: Collection[str] = ()
) -> PeftLora:
    """The config of a fork of an early PEFT, which knew one rank and one scale.

    Raises:
        AdapterError: what `read_peft_config` raises; `unsupported_feature`.
    """
    found = read_peft_config(config, also=also, accepted=accepted)
    if found.rslora or found.ranks or found.alphas:
        raise AdapterError(
            "unsupported_feature",
            f"{system} knows no use_rslora, rank_pattern or alpha_pattern ({CONFIG})",
            fix="remove them",
        )  # fmt: skip
    return found


def needed(config: dict[str, Any], keys: Collection[str]) -> None:
    """Keys that the config must have. Raises AdapterError `missing_key`."""
    for key in keys:
        if key not in config:
            raise AdapterError("missing_key", f"{CONFIG} has no '{key}'", fix=f"add {key}")


def expert_count(config: dict[str, Any], key: str) -> int:
    """The number of experts. Raises AdapterError `missing_key`, `bad_value`."""
    needed(config, (key,))
    return whole_number(config[key], f"{key} in {CONFIG}", 1, MAX_EXPERTS)


def number(value: object, field: str, low: float, high: float) -> float:
    """`value` as a float within low..high. Raises AdapterError `bad_value`."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not low <= value <= high:  # type: ignore[operator]
        raise bad_value(field, value, f"a number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stack:
    """How a saver names the parts of a layer with experts of one rank and a router.

    Args:
        a, b: an expert's factors, `{}` for its number; an `a` without it is all experts'.
        router: the router's matrix.
    """

    a: str
    b: str
    router: str

    def read(
        self, folder: AdapterFolder, module: str, parts: dict[str, str], gate: dict[str, Any],
        scale: float, where: str = "",
    ) -> RoutedModule:  # fmt: skip
        """The layer, experts side by side.

        Args:
            parts: of the layer, as `group` gives them.
            gate: fields of a GateSpec but for its source, a router; `blocks` holds the ranks.
            scale: folded into B.
            where: what of the gate stands in which file, for messages.
        Raises:
            AdapterError: `missing_tensor`, `rank_mismatch`, those of `make_gate`.
        """
        experts = range(len(gate["blocks"]))
        with_a = experts if "{}" in self.a else experts[:1]
        a_names = [part(parts, self.a.format(e), module) for e in with_a]
        b_names = [part(parts, self.b.format(e), module) for e in experts]
        a_RK, b_NR = stack_experts(folder, a_names, b_names, gate["blocks"][0])
        return RoutedModule(
            a_RK=a_RK,
            b_NR=b_NR * scale,
            gate=make_gate({"source": "router", **gate}, f"{module} {where}".rstrip()),
            router_GK=folder.take(part(parts, self.router, module)),
        )


def stack_experts(
    folder: AdapterFolder, a_names: Sequence[str], b_names: Sequence[str], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E r, in] and B [out, E r] of experts of one rank, B as it is stored.

    Raises:
        AdapterError: `missing_tensor`, `rank_mismatch`.
    """
    width, out = folder.shape(a_names[0])[-1:], folder.shape(b_names[0])[:1]
    for name in a_names:
        if folder.shape(name) != (rank, *width):
            raise rank_mismatch(name, folder.shape(name), f"[{rank}, {_show(width)}]")
    for name in b_names:
        if folder.shape(name) != (*out, rank):
            raise rank_mismatch(name, folder.shape(name), f"[{_show(out)}, {rank}]")
    a_RK = torch.cat([folder.take(name) for name in a_names])
    return a_RK, torch.cat([folder.take(name) for name in b_names], dim=1)


def _show(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if sizes else "?"
