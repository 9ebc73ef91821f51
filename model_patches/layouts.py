"""The form of an adapter's parts in a host copy: shapes, and what fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights

from vllm_lora_ext.adapters.model import NO_GATE, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.plan import Shape
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.mlp import Block
from vllm_lora_ext.model_patches.residency import Fill
from vllm_lora_ext.model_patches.stock_lane import refuse_gate
from vllm_lora_ext.routing import GateSpec


def site(layer: RoutedLinear, slices: Sequence[RoutedModule | None]) -> tuple[list[Shape], Fill]:
    """A linear layer of ours, by its slices as this rank holds them."""
    return layer.site.shapes(slices), lambda out: layer.site.pack(slices, out)


def modules_of(weights: LoRALayerWeights) -> list[RoutedModule | None]:
    """One for each slice of a layer, scales in B."""
    a, b = weights.lora_a, weights.lora_b
    pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
    return [None if a is None else RoutedModule(a, b) for a, b in pairs]


def formed_site(
    name: str, layer: RoutedLinear, modules: Sequence[RoutedModule | None]
) -> tuple[list[Shape], Fill]:
    """The same of whole slices that vLLM has formed. Raises AdapterError `shape_mismatch`."""
    try:
        return site(layer, layer.sharded(modules))
    except ValueError as error:
        raise AdapterError(
            "shape_mismatch", f"{name} has other sizes in the adapter than in the model",
            seen=str(error), fix="serve it with the model it was trained on",
        ) from error  # fmt: skip


def stock(
    name: str,
    layer: BaseLayerWithLoRA,
    modules: Sequence[RoutedModule | None],
    dtype: torch.dtype,
) -> tuple[list[Shape], Fill]:
    """An embedding, whose A the slot holds transposed, the output matrix, or the linear layer of
    a classification head."""
    (part,) = modules
    assert part is not None
    if part.gate.source != "classifier":
        refuse_gate(name, part)
    embedding = isinstance(layer, VocabParallelEmbeddingWithLoRA)
    a = part.a_RK.t() if embedding else part.a_RK

    def fill(out: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        a_out, b_out = out[0].copy_(a), out[1].copy_(part.b_NR)
        return (a_out.t() if embedding else a_out), b_out

    return [(tuple(a.shape), dtype), (tuple(part.b_NR.shape), dtype)], fill


def factors(module: RoutedModule) -> torch.Tensor:
    """int64 [R]: the number of a row that multiplies each rank, -1: none; of a classifier's gates,
    which are taken as they are."""
    blocks = torch.tensor(module.gate.blocks or (module.rank,))
    first = module.row_start if module.gate.columns else -1
    columns = first + torch.arange(len(blocks))
    return columns.repeat_interleave(blocks)


def block(block: Block, experts: MixBlock) -> tuple[list[Shape], Fill]:
    """An MLP block with experts."""
    return block.shapes(experts), lambda out: block.pack(experts, out)


def is_linear(adapter: RoutedAdapter) -> bool:
    """Whether the adapter's columns multiply all that it adds, and nothing else is done to them."""
    gates = [module.gate for module in adapter.modules.values()]
    one = GateSpec("request", blocks=(1,))
    multiplied = all(
        gate.columns and replace(gate, source="request", blocks=(1,), constant=1.0) == one
        for gate in gates
    )
    own = adapter.blocks or adapter.experts or adapter.heads
    return not adapter.columns or (multiplied and not own)


def without_attention(module: RoutedModule) -> RoutedModule:
    """B A x alone, which is added first."""
    if module.gate.source != "attention":
        return module
    return replace(module, gate=NO_GATE, attention_PR=None)
