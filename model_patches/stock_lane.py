"""Parts of an adapter for which vLLM's own layers stay: fused experts, and classification heads.

Target: the functions with which vLLM's manager forms what it has loaded for its layers. They get
tensors that were read and checked as all others, and what they make goes into the same slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ClassificationHeadWithLoRA,
    FusedMoE3DWithLoRA,
    FusedMoEWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.model_executor.layers.fused_moe import MoERunner

from vllm_lora_ext.adapters.model import FusedExperts, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.parts import (
    ExpertsSlot,
    HeadSlot,
    check_experts_fit,
    check_heads_fit,
    no_experts,
)
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.residency import HeadWeights, Weights


class StockLane:
    """Of one engine.

    Args:
        manager: its adapter manager, layers built.
    Attributes:
        shapes: name of a layer that an adapter's low-rank pair may name: a linear of one expert,
            or the classification head → (in, out).
        experts: name of a parameter of all experts → what it takes.
        heads: name of the classification head → what it takes.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        layers: Mapping[str, BaseLayerWithLoRA] = manager.modules
        heads = {n: m for n, m in layers.items() if isinstance(m, ClassificationHeadWithLoRA)}
        self._fused = {n: m for n, m in layers.items() if isinstance(m, FusedMoEWithLoRA)}
        self._parts = {name: manager.packed_modules.get(name, []) for name in self._fused}
        self._bare = tuple(_bare_experts(manager.model, layers))
        self.heads = {n: HeadSlot(m.input_size, m.max_lora_cls_labels) for n, m in heads.items()}
        self.experts: dict[str, ExpertsSlot] = {}
        self.shapes = {name: (m.input_size, m.output_size) for name, m in heads.items()}
        for name, layer in self._fused.items():
            self.shapes |= _each_expert(self._parts[name], layer)
            self.experts |= {f"{name}.{p}": slot for p, slot in _all_experts(layer).items()}

    def packs(self, layer: str) -> bool:
        """Whether `pack` gives what this layer's slots take."""
        return layer in self._fused

    def by_parameter(self, names: Iterable[str]) -> dict[str, str]:
        """PEFT's names of wrapped parameters of experts, among others → what they wrap."""
        found = {}
        for name in names:
            layer = name.removesuffix(".base_layer")
            parameter = "down_proj" if layer == name else "gate_up_proj"
            if f"{layer}.{parameter}" in self.experts:
                found[name] = f"{layer}.{parameter}"
        return found

    def check(self, adapter: RoutedAdapter, name_of: Mapping[str, str], away: set[str]) -> None:
        """That vLLM's layers can hold what the adapter has for them.

        Args:
            name_of: name of a layer or parameter in the adapter → vLLM's.
            away: names of those that live on another rank.
        Raises:
            AdapterError: `unsupported_feature`, and those of `check_heads_fit` and
                `check_experts_fit`.
        """
        for name in (*adapter.modules, *adapter.experts):
            self._check_kind(name, name_of[name])
            if name_of[name] in self.shapes and name in adapter.modules:
                refuse_gate(name, adapter.modules[name])
        heads = [*adapter.heads, *(n for n in adapter.modules if name_of[n] in self.heads)]
        if heads and self._manager._pooling_task == "token_classify":
            raise AdapterError(
                "unsupported_feature", "the adapter has a classification head, and this server"
                " classifies single tokens", seen=heads[0], limit="LoRA on the model below it",
                fix="train it without the head, or serve a model that classifies whole prompts",
            )  # fmt: skip
        dtype, rank = self._manager.lora_config.lora_dtype, self._manager.lora_config.max_lora_rank
        check_heads_fit(adapter.heads, self.heads, dtype)
        here = {name: e for name, e in adapter.experts.items() if name not in away}
        slots = {n: self.experts[name_of[n]] for n in here if name_of[n] in self.experts}
        check_experts_fit(here, slots, dtype, rank)

    def _check_kind(self, name: str, vllm_name: str) -> None:
        """That LoRA on experts is served here, and of this kind."""
        if vllm_name.startswith(self._bare):
            raise AdapterError(
                "unsupported_feature", "the adapter has LoRA on fused experts, which vLLM computes"
                " on a GPU only", seen=name,
                limit="attention, router gates and other linear layers",
                fix="serve it on a GPU, or leave the experts out with --lora-target-modules",
            )  # fmt: skip
        layer = self._fused.get(vllm_name.partition(".experts.")[0] + ".experts")
        each = ".experts." in vllm_name and vllm_name not in self.experts
        if each and isinstance(layer, FusedMoE3DWithLoRA):
            raise AdapterError(
                "unsupported_feature", "the adapter has LoRA on single experts, and this engine"
                " holds that on all experts of a layer", seen=name, limit=sorted(self.experts)[:2],
                fix="start with --enable-mixed-moe-lora-format",
            )  # fmt: skip

    def pack(
        self, adapter: RoutedAdapter, name_of: Mapping[str, str], away: set[str]
    ) -> tuple[dict[str, Weights], dict[str, HeadWeights]]:
        """What was checked, as vLLM's layers take it: experts of this rank, not yet sharded.

        Returns:
            Layer of fused experts → arguments of `set_lora`; head → of `set_module_to_save`.
        Raises:
            AdapterError: `duplicate_tensor`, `unsupported_feature`.
        """
        dtype = self._manager.lora_config.lora_dtype
        each = {name_of[n]: m for n, m in adapter.modules.items() if n not in away}
        fused = {name_of[n]: e for n, e in adapter.experts.items() if n not in away}
        heads = {n: (h.weight_NK.to(dtype), h.bias_N) for n, h in adapter.heads.items()}
        loras: dict[str, LoRALayerWeights] = {}
        for name, parts in self._parts.items():
            own, pair = _own(each, parts, self.shapes), self._pair(fused, name)
            if own and pair:
                raise AdapterError(
                    "duplicate_tensor", "the adapter has LoRA on each expert and on all of them",
                    seen=name, fix="save one adapter per folder",
                )  # fmt: skip
            loras |= {n: _lora(n, a, b, dtype) for n, (a, b) in {**own, **pair}.items()}
        return self._merged(loras) if loras else {}, heads

    def _merged(self, loras: dict[str, LoRALayerWeights]) -> dict[str, Weights]:
        """Stacked over experts, by vLLM's own functions."""
        model = LoRAModel(1, 0, loras)
        try:
            for name, layer in self._fused.items():
                if f"{name}.base_layer" in loras and not isinstance(layer, FusedMoE3DWithLoRA):
                    self._manager._convert_3d_to_2d_moe_lora(model, layer, name)
            self._manager._validate_moe_lora_format(model)
            self._manager._create_merged_loras_inplace(model)
        except ValueError as error:
            raise AdapterError(
                "unsupported_feature", f"vLLM's layers do not take the adapter's experts: {error}",
                fix="train all experts of a layer alike",
            ) from error  # fmt: skip
        found = {name: model.loras[name] for name in self._fused if name in model.loras}
        return {name: (lora.lora_a, lora.lora_b) for name, lora in found.items()}

    def _pair(
        self, fused: Mapping[str, FusedExperts], name: str
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Both parameters of a layer, as PEFT calls them; a missing one changes nothing."""
        parts = {p: fused.get(f"{name}.{p}") for p in ("gate_up_proj", "down_proj")}
        like = next((part for part in parts.values() if part), None)
        if like is None:
            return {}
        found = [part or no_experts(like, self.experts[f"{name}.{p}"]) for p, part in parts.items()]
        names = f"{name}.base_layer", name
        return {n: (e.a_QK, e.b_NQ) for n, e in zip(names, found, strict=True)}


def refuse_gate(name: str, module: RoutedModule) -> None:
    """Raises AdapterError `unsupported_feature` for a gate, or DoRA's magnitudes, in a layer that
    adds its B A x as it is."""
    if module.magnitude_N is not None:
        raise AdapterError(
            "unsupported_feature", "the adapter has DoRA's magnitudes at an output matrix,"
            " classification head or base expert, whose output nothing rescales", seen=name,
            limit="DoRA on linear layers", fix=f"train it without {name}, or without DoRA there",
        )  # fmt: skip
    if module.gate.source != "none":
        raise AdapterError(
            "unsupported_feature", "the adapter has a gate at an embedding, output matrix,"
            " classification head or base expert, where none is computed",
            seen=f"{name}: {module.gate.num_gates} gates",
            limit="gates in linear layers and MLP blocks",
            fix=f"train or export the adapter without {name}, or with a plain LoRA there",
        )  # fmt: skip


def _bare_experts(model: nn.Module, layers: Mapping[str, BaseLayerWithLoRA]) -> Iterator[str]:
    """Prefixes of the fused experts that take no LoRA here."""
    for name, module in model.named_modules():
        if isinstance(module, MoERunner) and name.removesuffix(".base_layer") not in layers:
            yield f"{name}."


def _sizes(layer: FusedMoEWithLoRA) -> tuple[int, int]:
    """Width of the model and of one expert, unsharded and without what kernels pad."""
    config = layer.moe_config
    return (
        config.hidden_dim_unpadded,
        config.intermediate_size_per_partition_unpadded * layer.tp_size,
    )


def _each_expert(
    parts: list[str], layer: FusedMoEWithLoRA
) -> Iterator[tuple[str, tuple[int, int]]]:
    """(in, out) of each expert's linears: w1, w2 and, of a gated MLP, w3, expert by expert."""
    per_expert = len(parts) // layer.global_num_experts
    hidden, inner = _sizes(layer)
    for i, part in enumerate(parts if per_expert > 1 else ()):
        yield part, (inner, hidden) if i % per_expert == 1 else (hidden, inner)


def _all_experts(layer: FusedMoEWithLoRA) -> dict[str, ExpertsSlot]:
    if layer.enable_moe_shared_loras or not layer.moe_config.is_act_and_mul:
        return {}
    count, (hidden, inner) = layer.global_num_experts, _sizes(layer)
    return {
        "gate_up_proj": ExpertsSlot(count, hidden, 2 * inner),
        "down_proj": ExpertsSlot(count, inner, hidden),
    }


def _own(
    each: Mapping[str, RoutedModule], parts: list[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of all linears of a layer's experts; those without LoRA get one that changes nothing,
    which vLLM's stacked weights need."""
    if not any(part in each for part in parts):
        return {}
    ranks = {part.rpartition(".")[2]: each[part].rank for part in parts if part in each}
    found = {}
    for part in parts:
        width, out = shapes[part]
        rank = ranks.get(part.rpartition(".")[2], 1)
        own = each.get(part) or RoutedModule(torch.zeros(rank, width), torch.zeros(out, rank))
        found[part] = own.a_RK, own.b_NR
    return found


def _lora(name: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> LoRALayerWeights:
    rank = a.shape[0]
    return LoRALayerWeights(name, rank, rank, a.to(dtype), b.to(dtype), scaling=1.0)
