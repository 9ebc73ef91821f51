"""Random gates, layers and adapters for property tests, drawn over the whole gate table.

`rng` is a `numpy.random.Generator` everywhere. Weights are large enough that a wrong routing
decision shows: an adapter moves the logits of the tiny models by 0.3 to 0.6 on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_lora_ext import routing
from vllm_lora_ext.adapters.hf import delta_reference
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.routing import GateSpec, InputNorm

FIXTURES = Path(__file__).parent / "fixtures"
BASE_LLAMA, BASE_QWEN2 = FIXTURES / "bases/base_llama", FIXTURES / "bases/base_qwen2"
SOURCES = ("none", "router", "self", "prototype")
GIVEN = ("request", "position")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def random_spec(
    rng: np.random.Generator,
    max_rank: int = 40,
    sources: Sequence[str] = SOURCES,
    stable: bool = True,
    wide: bool = False,
) -> GateSpec:
    """Any row of the gate table.

    Args:
        max_rank: R and G stay at or below it.
        stable: leave out the rows that divide by a sum which can be near zero (renormalised
            signed scores): there two correct fp32 implementations may differ by any amount.
        wide: also normalised inputs, products and square roots.
    """
    source = pick(rng, sources)
    if source == "none":
        return GateSpec()
    blocks = _blocks(rng, source, max_rank)
    score = pick(rng, ["identity", "softmax", "sigmoid", "l2", "abs"])
    select = pick(rng, ["all", "top_k", "threshold", "top_p"])
    fields: dict[str, Any] = {
        "source": source,
        "blocks": blocks,
        "score": score,
        "bias": pick(rng, ["none", "select", "value"]),
        "select": select,
        "weight": pick(rng, ["score", "renormalise", "softmax", "one"]),
        "constant": pick(rng, [1.0, 1.0, 2.0, 0.5]),
    }
    if score == "softmax":
        fields["score_temperature"] = pick(rng, [1.0, 0.5, 3.0])
    fields |= _selection(rng, select, len(blocks), _typical(score, len(blocks)))
    if fields["weight"] == "softmax":
        fields["temperature"] = pick(rng, [1.0, 0.3, 2.0])
    if rng.random() < 0.25:
        fields["mask_below"] = round(_typical(score, len(blocks)) * rng.uniform(0.3, 0.9), 3)
    if stable and fields["weight"] == "renormalise":
        # value - threshold is >= 0 too: only what is above the threshold stays.
        fields["score"] = pick(rng, ["softmax", "sigmoid", "abs"])
        if fields["score"] != "softmax":
            fields.pop("score_temperature", None)
        fields["key"] = "signed"
        if fields["bias"] == "value":
            fields["bias"] = "select"
        if fields.get("subtract_threshold"):
            fields["bias"] = "none"
    if wide:
        fields |= _wide(rng, fields)
    return GateSpec(**fields)


def _wide(rng: np.random.Generator, fields: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if fields["source"] in ("router", "prototype") and rng.random() < 0.4:
        more |= {"normalise": "layer", "normalise_eps": pick(rng, [1e-5, 1e-3])}
    if rng.random() < 0.3:
        blocks = fields["blocks"]
        more |= {"product": True, "blocks": (min(blocks),) * len(blocks)}
    if fields["weight"] == "score" and rng.random() < 0.3:
        # The root of what is near zero hangs on rounding.
        more |= {"weight": "sqrt", "score": "sigmoid", "bias": "none", "subtract_threshold": False}
        if fields["score"] == "softmax":
            more["score_temperature"] = 1.0
    return more


def _blocks(rng: np.random.Generator, source: str, max_rank: int) -> tuple[int, ...]:
    if source == "self":
        return (1,) * int(rng.integers(1, min(24, max_rank) + 1))
    gates = int(rng.integers(1, min(12, max_rank) + 1))
    largest = max(1, min(6, max_rank // gates))
    if rng.random() < 0.5:
        return (int(rng.integers(1, largest + 1)),) * gates
    return tuple(int(rng.integers(1, largest + 1)) for _ in range(gates))


def _typical(score: str, gates: int) -> float:
    """About the middle of a score's values, so that a threshold there keeps some gates."""
    middle = {"identity": 0.4, "softmax": 1 / gates, "sigmoid": 0.5, "abs": 0.8}
    return middle.get(score, 0.4 / math.sqrt(gates))


def _selection(rng: np.random.Generator, select: str, gates: int, typical: float) -> dict[str, Any]:
    key = {} if select == "all" else {"key": pick(rng, ["signed", "signed", "abs"])}
    match select:
        case "top_k":
            return key | {"k": int(rng.integers(1, gates + 1))}
        case "threshold":
            return key | {
                "threshold": round(typical * rng.uniform(0.4, 1.2), 3),
                "threshold_head": bool(rng.random() < 0.5),
                "subtract_threshold": bool(rng.random() < 0.5),
            }
        case "top_p":
            return key | {"top_p": pick(rng, [0.3, 0.6, 0.9, 1.0])}
    return key


def random_module(
    rng: np.random.Generator,
    k: int,
    n: int,
    spec: GateSpec,
    rank: int = 6,
    strength: float = 0.3,
    kind: str = "linear",
) -> RoutedModule:
    """One adapted layer in=k, out=n.

    Args:
        rank: R of a layer without a gate; a gate brings its own.
        strength: root mean square of what the layer adds, for inputs of size 1.
    """
    total = sum(spec.blocks) or rank
    routed = spec.source in ("router", "prototype")
    router_GK = normal(rng, spec.num_gates, k) * (1.5 / math.sqrt(k)) if routed else None
    normalised: dict[str, Any] = {}
    if spec.normalise != "none":
        assert router_GK is not None
        tail = normal(rng, int(rng.integers(1, 9))) if rng.random() < 0.5 else None
        columns = normal(rng, spec.num_gates, 0 if tail is None else len(tail)) / math.sqrt(k)
        whole = torch.cat([router_GK, columns], dim=1)
        normalised = {
            "norm": InputNorm.of(whole, tail), "logit_bias_G": normal(rng, spec.num_gates) * 0.3,
        }  # fmt: skip
    module = RoutedModule(
        a_RK=normal(rng, total, k) / (1 if kind == "embedding" else math.sqrt(k)),
        b_NR=normal(rng, n, total),
        gate=spec,
        router_GK=router_GK,
        bias_G=_bias(rng, spec) if spec.bias != "none" else None,
        head_K=normal(rng, k) / math.sqrt(k) if spec.threshold_head else None,
        head_bias=float(np.float32(rng.normal())) if spec.threshold_head else 0.0,
        attention_PR=normal(rng, 3 * total, total) * (1.5 / math.sqrt(total))
        if spec.source == "attention"
        else None,
        kind=kind,  # type: ignore[arg-type]
        **normalised,
    )
    if spec.columns:
        given_TG = normal(rng, 64, spec.columns)
        added = routing.delta_reference(module, normal(rng, 64, k), given_TG)
    else:
        probe = torch.arange(min(k, 64)) if kind == "embedding" else normal(rng, 64, k)
        added = delta_reference(module, probe)
    size = float(added.square().mean().sqrt())
    return _with_b(module, module.b_NR * (strength / size)) if size > 1e-3 else module


def _with_b(module: RoutedModule, b_NR: torch.Tensor) -> RoutedModule:
    return RoutedModule(**{**vars(module), "b_NR": b_NR})


def _bias(rng: np.random.Generator, spec: GateSpec) -> torch.Tensor:
    return normal(rng, spec.num_gates) * 0.5 * _typical(spec.score, spec.num_gates)


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Module name → (in, out) of the seven linears of every layer of a Llama or Qwen2 config."""
    hidden, inter = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    sizes = {
        "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv), "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inter), "mlp.up_proj": (hidden, inter),
        "mlp.down_proj": (inter, hidden),
    }  # fmt: skip
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{i}.{name}": size for i in layers for name, size in sizes.items()}


def random_adapter(
    config: Any,
    seed: int = 0,
    specs: GateSpec | Sequence[GateSpec] | Callable[[np.random.Generator], GateSpec] | None = None,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    rank: int = 6,
    strength: float = 0.1,
    max_rank: int = 40,
    base_model: str = "",
) -> RoutedAdapter:
    """An adapter for a tiny Llama or Qwen2.

    Args:
        config: the base model's transformers config.
        specs: one gate for all layers, several to draw from, a function of rng, or None for
            any row of the table, drawn anew for every layer.
        targets: last parts of the adapted modules' names.
        layers: numbers of the adapted layers; None is all of them.
        rank: of the modules without a gate.
        max_rank: of the modules whose gate is drawn.
    """
    rng = np.random.default_rng(seed)
    modules = {}
    for name, (k, n) in linear_shapes(config).items():
        layer, target = int(name.split(".")[2]), name.rsplit(".", 1)[1]
        if target not in targets or (layers is not None and layer not in layers):
            continue
        if specs is None:
            spec = random_spec(rng, max_rank)
        elif isinstance(specs, GateSpec):
            spec = specs
        else:
            spec = specs(rng) if callable(specs) else pick(rng, specs)
        modules[name] = random_module(rng, k, n, spec, rank, strength)
    base = base_model or Path(getattr(config, "_name_or_path", "") or "").name
    return RoutedAdapter(modules, system="random", base_model=base)


def router_spec(experts: int = 4, rank: int = 2, k: int = 2) -> GateSpec:
    """A usual top-k router: softmax over experts, the k largest, renormalised."""
    return GateSpec(
        source="router", blocks=(rank,) * experts, score="softmax", select="top_k", k=k,
        weight="renormalise",
    )  # fmt: skip
