"""(in, out) of the layers that adapters name: as the model has them, and as an adapter does."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.lora.layers import BaseLayerWithLoRA

from vllm_lora_ext.adapters.checks import BLOCK_PARTS
from vllm_lora_ext.adapters.model import LowRank, RoutedAdapter, RoutedModule
from vllm_lora_ext.model_patches.layers import RoutedLinear


def sizes_of(
    modules: Mapping[str, BaseLayerWithLoRA], packed: Mapping[str, list[str]]
) -> dict[str, tuple[int, int]]:
    """(in, out) of everything that an adapter can name, unsharded."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in modules.items():
        if isinstance(layer, RoutedLinear):
            k, sizes = layer.full_sizes()
            parts = packed.get(name, [name])
            if len(parts) <= len(sizes):
                each = zip(parts, layer.part_sizes(len(parts)), strict=True)
                shapes |= {part: (k, sum(n)) for part, n in each}
        elif name.endswith("lm_head"):
            shapes[name] = (layer.hidden_size, layer.vocab_size)
        elif hasattr(layer.base_layer, "org_vocab_size"):
            shapes[name] = (layer.base_layer.org_vocab_size, layer.base_layer.embedding_dim)
    return shapes


def block_layers(adapter: RoutedAdapter) -> list[str]:
    """Every layer that a block of the adapter may have, adapted or not."""
    every = sorted(set().union(*BLOCK_PARTS))
    return [f"{block}.{layer}" for block in adapter.blocks for layer in every]


def own_sizes(adapter: RoutedAdapter, names: set[str]) -> dict[str, tuple[int, int]]:
    """(in, out) as the adapter has them, of layers that live elsewhere and are checked there."""
    layers: dict[str, RoutedModule | LowRank] = dict(adapter.modules)
    for block, experts in adapter.blocks.items():
        layers |= {f"{block}.{part}": m for part, m in experts.parts.items()}
    shapes = {n: (m.a_RK.shape[1], m.b_NR.shape[0]) for n, m in layers.items() if n in names}
    for block, experts in adapter.blocks.items():
        width = experts.router_GK.shape[1]
        first = (f"{block}.{n}" for n in ("gate_proj", "up_proj", "gate_up_proj", "fc1"))
        shapes |= {n: (width, 0) for n in first if n in names and n not in shapes}
    sizes = adapter.template.sizes if adapter.template is not None else {}
    return shapes | {n: size for n, size in sizes.items() if n in names}
