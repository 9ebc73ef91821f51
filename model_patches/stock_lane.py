"""Parts of an adapter for which vLLM's own layers stay: fused experts, and classification heads.

Target: the functions with which vLLM's manager forms what it has loaded for its layers. They get
tensors that were read and checked as all others, and what they make goes into the same slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from vllm_lora_ext.adapters.model import FusedExperts, Head, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.parts import (
    ExpertsSlot,
    HeadSlot,
    check_experts_fit,
    check_heads_fit,
    no_experts,
)
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.plan import Shape
from vllm_lora_ext.model_patches.residency import Fill, HeadWeights, Layout


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
        self._heads = heads
        self._fused = {n: m for n, m in layers.items() if isinstance(m, FusedMoEWithLoRA)}
        self._parts = {name: manager.packed_modules.get(name, []) for name in self._fused}
        self._bare = tuple(_bare_experts(manager.model, layers))
        self.heads = {
            n: HeadSlot(m.input_size, m.max_lora_cls_labels, m.full_bias_stacked.dtype)
            for n, m in heads.items()
        }
        self.experts: dict[str, ExpertsSlot] = {}
        self.shapes = {name: (m.input_size, m.output_size) for name, m in heads.items()}
        for name, layer in self._fused.items():
            self.shapes |= _each_expert(self._parts[name], layer)
            self.experts |= {f"{name}.{p}": slot for p, slot in _all_experts(layer).items()}

    def packs(self, layer: str) -> bool:
        """Whether it is `layouts` that gives what this layer's slots take."""
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

    def layouts(
        self, adapter: RoutedAdapter, name_of: Mapping[str, str], away: set[str]
    ) -> tuple[Layout, Layout]:
        """What was checked, as the slots of vLLM's layers on this rank hold it.

        Returns:
            Layer of fused experts → `HostAdapter.stock`; head → `HostAdapter.heads`.
        Raises:
            AdapterError: `duplicate_tensor`, `unsupported_feature`.
        """
        dtype = self._manager.lora_config.lora_dtype
        each = {name_of[n]: m for n, m in adapter.modules.items() if n not in away}
        fused = {name_of[n]: e for n, e in adapter.experts.items() if n not in away}
        loras: dict[str, LoRALayerWeights] = {}
        for name, parts in self._parts.items():
            own, pair = _own(each, parts, self.shapes), self._pair(fused, name)
            if own and pair:
                raise AdapterError(
                    "duplicate_tensor", "the adapter has LoRA on each expert and on all of them",
                    seen=name, fix="save one adapter per folder",
                )  # fmt: skip
            loras |= {n: _lora(n, a, b, dtype) for n, (a, b) in {**own, **pair}.items()}
        heads = {n: self.head_layout(n, h) for n, h in adapter.heads.items()}
        return self._merged(loras) if loras else {}, heads

    def head_layout(self, name: str, head: Head) -> tuple[list[Shape], Fill]:
        """A trained head in the dtypes of the slots."""
        layer = self._heads[name]
        of = [(head.weight_NK, layer.full_weight_stacked.dtype)]
        if head.bias_N is not None:
            of.append((head.bias_N, layer.full_bias_stacked.dtype))

        def fill(out: list[torch.Tensor]) -> HeadWeights:
            weight_NK, *bias = (o.copy_(part) for o, (part, _) in zip(out, of, strict=True))
            return weight_NK, bias[0] if bias else None

        return [(tuple(part.shape), dtype) for part, dtype in of], fill

    def experts_layout(
        self, name: str, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
    ) -> tuple[list[Shape], Fill]:
        """This rank's part of a layer's experts, by stock's own slicing.

        Args:
            a, b: as the layer's `set_lora` takes them, unsharded.
        Raises:
            AdapterError: `unsupported_feature`, they are not what the slot has room for.
        """
        layer = self._fused[name]
        w13 = (0, 2)[: layer._w13_slices]
        whole = [*((layer._slice_w13_a, a[i]) for i in w13),
                 *((layer._slice_w13_b, b[i]) for i in w13),
                 (layer._slice_w2_a, a[1]), (layer._slice_w2_b, b[1])]  # fmt: skip
        tables = expert_tables(layer)
        with _says_stock():
            parts = [
                cut(layer._match_expert_dim(part, table))
                for (cut, part), table in zip(whole, tables, strict=True)
            ]
            for part, table in zip(parts, tables, strict=True):
                if any(has > room for has, room in zip(part.shape, table.shape[1:], strict=True)):
                    raise ValueError(f"{name}: {list(part.shape)} in {list(table.shape[1:])}")

        def fill(out: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(o.copy_(part) for o, part in zip(out, parts, strict=True))

        return [(tuple(p.shape), t.dtype) for p, t in zip(parts, tables, strict=True)], fill

    def form(self, lora: LoRAModel) -> None:
        """Has vLLM form a model of its own for its layers, in place.

        Raises:
            AdapterError: `unsupported_feature`, it does not take it.
        """
        with _says_stock():
            self._manager._validate_moe_lora_format(lora)
            self._manager._create_merged_loras_inplace(lora)

    def formed(self, lora: LoRAModel, name: str) -> tuple[LoRALayerWeights | None, Head | None]:
        """What a model that `form` was called with has for a layer, by stock's own look-up."""
        full = (
            self._manager._get_module_to_save_weights(lora, name) if name in self._heads else None
        )
        weights = self._manager._get_lora_layer_weights(lora, name)
        return weights, full and Head(full.weight, full.bias)

    def _merged(self, loras: dict[str, LoRALayerWeights]) -> Layout:
        """Stacked over experts, by vLLM's own functions."""
        model = LoRAModel(1, 0, loras)
        with _says_stock():
            for name, layer in self._fused.items():
                if f"{name}.base_layer" in loras and not isinstance(layer, FusedMoE3DWithLoRA):
                    self._manager._convert_3d_to_2d_moe_lora(model, layer, name)
        self.form(model)
        found = {name: model.loras[name] for name in self._fused if name in model.loras}
        return {n: self.experts_layout(n, lora.lora_a, lora.lora_b) for n, lora in found.items()}

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


def put(layer: BaseLayerWithLoRA, slot: int, weights: Sequence[torch.Tensor]) -> None:
    """Into a slot of a layer of vLLM's own, by asynchronous copies: stock's `set_lora`, without
    what it would cut of experts for the rank."""
    if not isinstance(layer, FusedMoEWithLoRA):
        layer.set_lora(slot, *weights)
        return
    layer.reset_lora(slot)
    layer.adapter_enabled[slot] = 1
    for table, part in zip(expert_tables(layer), weights, strict=True):
        _, rows, columns = part.shape
        table[slot, :, :rows, :columns].copy_(part, non_blocking=True)


def expert_tables(layer: FusedMoEWithLoRA) -> list[torch.Tensor]:
    """A and B of all slots of fused experts: of their first linears, then of their last."""
    return [*layer.w13_lora_a_stacked, *layer.w13_lora_b_stacked,
            *layer.w2_lora_a_stacked, *layer.w2_lora_b_stacked]  # fmt: skip


@contextmanager
def _says_stock() -> Iterator[None]:
    """What vLLM's functions say about an adapter's tensors, as an error of the adapter's."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        raise AdapterError(
            "unsupported_feature", f"vLLM's layers do not take the adapter's weights: {error}",
            fix="train all experts of a layer alike, of the model that is served",
        ) from error  # fmt: skip


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
