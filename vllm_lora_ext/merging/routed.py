"""Routed adapters with the same gate, put side by side: one routing over the experts of all.

A layer whose adapters have E_1 and E_2 experts gets E_1 + E_2 of them, with the routers' rows one
below the other, and *one* gate over all of them: one softmax, one choice of k, one sum to divide
by. The result is not the sum of the adapters. An expert's weight falls when others score higher,
and k experts are used in all, not k of each adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vllm_lora_ext.adapters import RoutedAdapter, RoutedModule, check_adapter
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import LowRank, MixBlock
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec


def concat_routed(adapters: Sequence[RoutedAdapter], k: int | None = None) -> RoutedAdapter:
    """The experts of several routed adapters under one gate, in the adapters' order.

    Every layer's gates must agree in all but the number of experts, their ranks and, when `k` is
    given, k. Thresholds, biases, temperatures and constants keep their values: where they were
    chosen for a number of experts (a threshold of 1/E), they now meet scores of more of them.
    Experts that share one A go on sharing it when all adapters hold the same one, else each gets
    its own copy.

    Args:
        adapters: two or more, on the same layers of one base model.
        k: experts that a token uses in every layer; None keeps the adapters' own.
    Raises:
        AdapterError: `bad_value` (fewer than two, or a k without top-k), `setting_mismatch` (gates
            or base models differ), `unsupported_feature` (a layer without a gate, ranks that gate
            themselves, different threshold heads), `missing_tensor` (a layer that one of them
            does not adapt), `shape_mismatch`, `k_too_large`, and those of `check_adapter`.
    """
    if len(adapters) < 2:
        raise AdapterError(
            "bad_value", "there is nothing to put side by side", seen=len(adapters),
            limit="two routed adapters or more", fix="name more of them",
        )  # fmt: skip
    for adapter in adapters:
        check_adapter(adapter)
        if adapter.columns or adapter.template is not None or adapter.classifier is not None:
            raise AdapterError(
                "unsupported_feature", "the gates of this adapter come with the request or the"
                " token's position, and have no place under one router", seen=adapter.system,
                limit="adapters whose gates read the token", fix="name it in the request's"
                " `adapters` beside the others",
            )  # fmt: skip
    base = one_base(adapter.base_model for adapter in adapters)
    modules = {
        name: _concat_modules(name, layers, k)
        for name, layers in _together(adapters, [a.modules for a in adapters]).items()
    }
    blocks = {
        name: _concat_blocks(name, found, k)
        for name, found in _together(adapters, [a.blocks for a in adapters]).items()
    }
    systems = {adapter.system for adapter in adapters}
    system = systems.pop() if len(systems) == 1 else "concat"
    made = RoutedAdapter(modules, system=system, base_model=base, blocks=blocks)
    check_adapter(made)
    return made


def one_base(names: Iterable[str]) -> str:
    """The base model that all name, a local copy counting as the same; empty when none names one.

    Raises:
        AdapterError: `setting_mismatch`.
    """
    named = [name for name in names if name]
    if len({name.rstrip("/").rsplit("/", 1)[-1] for name in named}) > 1:
        raise AdapterError(
            "setting_mismatch", "the adapters name different base models",
            seen=sorted(set(named))[:4], limit="one",
            fix="use adapters of one base model, or mend base_model_name_or_path",
        )  # fmt: skip
    return named[0] if named else ""


def same_sizes(module: str, layers: Mapping[str, Any]) -> tuple[int, int]:
    """(in, out) of a layer in all adapters: name → what has an a_RK and a b_NR.

    Raises:
        AdapterError: `shape_mismatch`.
    """
    sizes = {name: (m.a_RK.shape[1], m.b_NR.shape[0]) for name, m in layers.items()}
    first, *others = sizes.items()
    for name, size in others:
        if size != first[1]:
            raise AdapterError(
                "shape_mismatch", f"{module} has another size in {name} than in {first[0]}",
                seen=f"in {size[0]}, out {size[1]}",
                limit=f"in {first[1][0]}, out {first[1][1]}", fix="use adapters of one base model",
            )  # fmt: skip
    return first[1]


def _together(
    adapters: Sequence[RoutedAdapter], tables: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """What every adapter has under each name; a name that one lacks is an error."""
    for name in dict.fromkeys(name for table in tables for name in table):
        lacking = [i for i, table in enumerate(tables) if name not in table]
        if lacking:
            raise AdapterError(
                "missing_tensor", f"{_name(adapters, lacking[0])} does not adapt {name}, another"
                " adapter does: nothing says how often its experts are chosen there",
                limit="the same layers in every adapter",
                fix="leave the layer out of the others, or train the routers on the same layers",
            )  # fmt: skip
    return {name: [table[name] for table in tables] for name in tables[0]}


def _name(adapters: Sequence[RoutedAdapter], i: int) -> str:
    return adapters[i].source or f"adapter {i + 1}"


def _concat_modules(name: str, layers: Sequence[RoutedModule], k: int | None) -> RoutedModule:
    gate = _concat_gates(name, [layer.gate for layer in layers], k)
    same_sizes(name, {f"adapter {i + 1}": layer for i, layer in enumerate(layers)})
    first = layers[0]
    if gate.threshold_head and not all(_same_head(layer, first) for layer in layers):
        raise AdapterError(
            "unsupported_feature", f"the threshold heads of {name} differ: a token has one"
            " threshold, and two heads give two", limit="the same head in every adapter",
            fix="serve the adapters apart, or train one head over all experts",
        )  # fmt: skip
    return RoutedModule(
        a_RK=_stack_a(layers),
        b_NR=torch.cat([layer.b_NR for layer in layers], dim=1),
        gate=gate,
        router_GK=_stack([layer.router_GK for layer in layers]),
        bias_G=_stack([layer.bias_G for layer in layers]),
        head_K=first.head_K,
        head_bias=first.head_bias,
    )


def _concat_blocks(name: str, blocks: Sequence[MixBlock], k: int | None) -> MixBlock:
    first = blocks[0]
    for block in blocks[1:]:
        for what, seen, wanted in (
            ("layers", sorted(block.parts), sorted(first.parts)),
            ("activations", block.act, first.act),
        ):
            if seen != wanted:
                raise AdapterError(
                    "setting_mismatch", f"the experts of the MLP block {name} have different"
                    f" {what}", seen=seen or "the model's", limit=wanted or "the model's",
                    fix="serve the adapters apart",
                )  # fmt: skip
    parts = {}
    for part in first.parts:
        mine = {f"adapter {i + 1}": block.parts[part] for i, block in enumerate(blocks)}
        same_sizes(f"{name}.{part}", mine)
        parts[part] = LowRank(
            torch.cat([m.a_RK for m in mine.values()]),
            torch.cat([m.b_NR for m in mine.values()], dim=1),
        )
    gate = _concat_gates(name, [block.gate for block in blocks], k)
    return MixBlock(gate, torch.cat([block.router_GK for block in blocks]), parts, first.act)


def _concat_gates(name: str, gates: Sequence[GateSpec], k: int | None) -> GateSpec:
    """The one gate over all experts. Raises AdapterError."""
    for gate in gates:
        if gate.source in ("none", "self", "attention"):
            raise AdapterError(
                "unsupported_feature",
                f"{name} has no gate: its delta is always added, and would be so for the other"
                " adapter's experts" if gate.source == "none" else
                f"the ranks of {name} act by A x alone: they have no router to put beside"
                " another", seen=f"source {gate.source}", limit="source router or prototype",
                fix="serve the adapters apart, or merge adapters without gates",
            )  # fmt: skip
    fields = [_fields(gate, keep_k=k is None) for gate in gates]
    for other in fields[1:]:
        for key in sorted(set(other) | set(fields[0])):
            seen, wanted = other.get(key), fields[0].get(key)
            if seen != wanted:
                raise AdapterError(
                    "setting_mismatch", f"the gates of {name} differ in '{key}'",
                    seen=_said(seen), limit=_said(wanted),
                    fix="give k" if key == "k" else "serve the adapters apart",
                )  # fmt: skip
    if k is not None:
        if gates[0].select != "top_k":
            raise AdapterError(
                "bad_value", f"k is given, and the gate of {name} does not choose by top_k",
                seen=k, limit="no k", fix="leave k out",
            )  # fmt: skip
        fields[0]["k"] = k
    blocks = [rank for gate in gates for rank in gate.blocks]
    return make_gate({**fields[0], "blocks": blocks}, name)


def _fields(gate: GateSpec, keep_k: bool) -> dict[str, Any]:
    """A gate's settings without what may differ between the adapters."""
    dropped = ("blocks",) if keep_k else ("blocks", "k")
    return {key: value for key, value in gate.to_dict().items() if key not in dropped}


def _said(value: object) -> object:
    return "the default" if value is None else value


def _stack_a(layers: Sequence[RoutedModule]) -> torch.Tensor:
    """[R, in]; [R / n, in] when every expert of every adapter goes with the same A."""
    first = layers[0].a_RK
    shared = any(layer.a_RK.shape[0] != layer.rank for layer in layers)
    if shared and all(torch.equal(layer.a_RK, first) for layer in layers):
        return first
    return torch.cat([m.a_RK.repeat(m.rank // m.a_RK.shape[0], 1) for m in layers])


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def _same_head(one: RoutedModule, other: RoutedModule) -> bool:
    if one.head_K is None or other.head_K is None:
        return one.head_K is other.head_K
    return one.head_bias == other.head_bias and torch.equal(one.head_K, other.head_K)
