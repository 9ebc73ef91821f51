"""The manager of the model's LoRA layers: places whole `RoutedAdapter`s into slots.

Reached through `WorkerLoRAManager._manager_cls` (see `worker`), which is vLLM's own way to name a
manager class.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.triton_utils import HAS_TRITON

from vllm_lora_ext.adapters.checks import BLOCK_PARTS, check_fits
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.selfcheck import selfcheck
from vllm_lora_ext.kernels.mix_mlp.selfcheck import selfcheck as block_selfcheck
from vllm_lora_ext.model_patches.backend import check_graphs, choose_kernels
from vllm_lora_ext.model_patches.heap import keep_memory
from vllm_lora_ext.model_patches.layers import RoutedLinear, building
from vllm_lora_ext.model_patches.mlp import share_scratch, wrap_blocks
from vllm_lora_ext.model_patches.trace import Recorder, check_settings
from vllm_lora_ext.settings import LoraExtSettings

Placed = dict[str, list[RoutedModule | None]]


class RoutedLoRAModel(LoRAModel):
    """A checked adapter under vLLM's id: layer name → what the adapter does to its slices."""

    def __init__(
        self,
        lora_model_id: int,
        adapter: RoutedAdapter,
        placed: Placed,
        blocks: dict[str, MixBlock],
    ) -> None:
        super().__init__(lora_model_id, adapter.rank, {})
        self.adapter, self.placed, self.blocks = adapter, placed, blocks

    def clone(self, lora_model_id: int) -> RoutedLoRAModel:
        return RoutedLoRAModel(lora_model_id, self.adapter, self.placed, self.blocks)


class RoutedLoRAModelManager(LRUCacheLoRAModelManager):
    """Stock's LRU manager; only how an adapter gets into a slot, and out of it, is ours."""

    def __init__(self, *args: Any, lora_config: Any, vllm_config: Any, **kwargs: Any) -> None:
        settings = LoraExtSettings.from_additional_config(vllm_config.additional_config)
        _refuse_unsupported(vllm_config)
        self.router_rows = settings.router_rows(lora_config.max_lora_rank)
        self.base_name = vllm_config.model_config.model
        device_type = vllm_config.device_config.device_type
        kernels = choose_kernels(
            settings.triton, device_type,
            lambda: _selfcheck(kwargs["device"], lora_config, self.router_rows),
        )  # fmt: skip
        graphs = vllm_config.compilation_config.cudagraph_mode
        self.graphs = check_graphs(graphs and graphs.name, device_type, kernels)
        if device_type == "cpu":
            keep_memory()
        with building(self.router_rows, kernels):
            super().__init__(*args, lora_config=lora_config, vllm_config=vllm_config, **kwargs)
        self.blocks = wrap_blocks(self.model, self.modules)
        share_scratch(self.blocks.values(), vllm_config.model_config.dtype)
        if kernels:
            self._warm(vllm_config)
        if settings.trace:
            check_settings(vllm_config, self.graphs)
            self.recorder = Recorder(self)

    def _warm(self, vllm_config: Any) -> None:
        """Compiles all that a step can need, while nobody waits and no row has an adapter."""
        from vllm_lora_ext.kernels.gated_lora.backends.triton import warmup
        from vllm_lora_ext.kernels.mix_mlp import warmup as block_warmup

        options = (
            vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.dtype,
        )  # fmt: skip
        sites = [m.site for m in self.modules.values() if isinstance(m, RoutedLinear)]
        warmup.warm(sites, *options)
        block_warmup.warm([block.site for block in self.blocks.values()], *options)

    def model_of(self, lora_model_id: int, adapter: RoutedAdapter) -> RoutedLoRAModel:
        """Fits an adapter to this model's layers.

        Raises:
            AdapterError: a layer is unknown, a shape differs, a rank or a router is too large, or
                the model's MLP blocks cannot hold experts.
        """
        missing = self._missing()
        name_of = {n: self._vllm_name(n) for n in (*adapter.modules, *_block_layers(adapter))}
        away = {n for n, v in name_of.items() if v.startswith(missing)}
        shapes = self._shapes()
        check_fits(
            adapter,
            {n: shapes[v] for n, v in name_of.items() if v in shapes} | _own_shapes(adapter, away),
            self.lora_config.max_lora_rank,
            self.router_rows,
            self.base_name,
        )
        module_of = {name_of[n]: m for n, m in adapter.modules.items() if n not in away}
        blocks = {}
        for name, block in adapter.blocks.items():
            first = f"{name}.{min(block.parts)}"
            if first not in away:
                blocks[self._block(name, name_of[first].rpartition(".")[0], block)] = block
        return RoutedLoRAModel(lora_model_id, adapter, self._place(module_of), blocks)

    def _place(self, module_of: dict[str, RoutedModule]) -> Placed:
        placed: Placed = {}
        for layer_name in self.modules:
            parts = [module_of.get(n) for n in self.packed_modules.get(layer_name, [layer_name])]
            if any(p is not None for p in parts):
                placed[layer_name] = parts
        return placed

    def _block(self, name: str, vllm_name: str, block: MixBlock) -> str:
        if vllm_name not in self.blocks:
            raise AdapterError(
                "unsupported_feature", f"the adapter's experts are whole MLP blocks, and {name} is"
                " no block that can hold them", seen=type(self.model).__name__,
                limit="blocks that do first linear, activation, second linear and nothing else",
                fix="serve it with the model it was trained on",
            )  # fmt: skip
        if self.graphs and not self.blocks[vllm_name].on_kernel(block):
            raise AdapterError(
                "unsupported_feature", "the experts of this MLP block take the PyTorch path, which"
                " CUDA graphs cannot hold", seen=name,
                limit="activations that the kernel knows, and weights that sum to one where the"
                " second linear has a bias", fix="start with --enforce-eager",
            )  # fmt: skip
        return vllm_name

    def _vllm_name(self, module: str) -> str:
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = mapper and mapper.get_rename_mapper()
        return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0]

    def _missing(self) -> tuple[str, ...]:
        """Prefixes of the layers that live on another pipeline rank."""
        modules = self.model.named_modules()
        return tuple(f"{name}." for name, m in modules if isinstance(m, PPMissingLayer))

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of everything that an adapter can name, unsharded."""
        shapes: dict[str, tuple[int, int]] = {}
        for name, layer in self.modules.items():
            if isinstance(layer, RoutedLinear):
                k, sizes = layer.full_sizes()
                parts = self.packed_modules.get(name)
                if parts is None:
                    shapes[name] = (k, sum(sizes))
                elif len(parts) == len(sizes):
                    shapes |= {part: (k, n) for part, n in zip(parts, sizes, strict=True)}
            elif name.endswith("lm_head"):
                shapes[name] = (layer.hidden_size, layer.vocab_size)
            elif hasattr(layer.base_layer, "org_vocab_size"):
                shapes[name] = (layer.base_layer.org_vocab_size, layer.base_layer.embedding_dim)
        return shapes

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, RoutedLoRAModel):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Puts a registered adapter into a slot; all of it, or nothing and the error."""
        model = self._registered_adapters.cache.get(lora_id)
        if not isinstance(model, RoutedLoRAModel) or lora_id in self._active_adapters:
            return super().activate_adapter(lora_id)
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        try:
            for name, layer in self.modules.items():
                _load(layer, slot, model.placed.get(name))
            for name, block in model.blocks.items():
                self.blocks[name].load(slot, block)
        except BaseException:
            self._reset_slot(slot)
            raise
        self._registered_adapters.touch(lora_id)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self._reset_slot(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        for slot in range(self.lora_slots):
            self._reset_slot(slot)

    def follow_base(self) -> None:
        """To be called when vLLM has replaced the base weights."""
        for layer in self.modules.values():
            if isinstance(layer, RoutedLinear):
                layer.follow_base()

    def _reset_slot(self, slot: int) -> None:
        for layer in self.modules.values():
            layer.reset_lora(slot)
        for block in self.blocks.values():
            block.site.clear(slot)


def _load(layer: BaseLayerWithLoRA, slot: int, parts: list[RoutedModule | None] | None) -> None:
    layer.reset_lora(slot)
    if parts is None:
        return
    if isinstance(layer, RoutedLinear):
        layer.load(slot, parts)
        return
    (part,) = parts  # an embedding or the output matrix
    assert part is not None
    layer.set_lora(slot, part.a_RK, part.b_NR)


def _block_layers(adapter: RoutedAdapter) -> list[str]:
    """Every layer that a block of the adapter may have, adapted or not."""
    every = sorted(set().union(*BLOCK_PARTS))
    return [f"{block}.{layer}" for block in adapter.blocks for layer in every]


def _own_shapes(adapter: RoutedAdapter, names: set[str]) -> dict[str, tuple[int, int]]:
    """(in, out) as the adapter has them, of layers that live elsewhere and are checked there."""
    layers: dict[str, RoutedModule | LowRank] = dict(adapter.modules)
    for block, experts in adapter.blocks.items():
        layers |= {f"{block}.{part}": m for part, m in experts.parts.items()}
    shapes = {n: (m.a_RK.shape[1], m.b_NR.shape[0]) for n, m in layers.items() if n in names}
    for block, experts in adapter.blocks.items():
        width = experts.router_GK.shape[1]
        first = (f"{block}.{n}" for n in ("gate_proj", "up_proj", "gate_up_proj", "fc1"))
        shapes |= {n: (width, 0) for n in first if n in names and n not in shapes}
    return shapes


def _refuse_unsupported(vllm_config: Any) -> None:
    if vllm_config.lora_config.fully_sharded_loras:
        raise AdapterError(
            "bad_settings",
            "fully_sharded_loras is not supported with routed adapters",
            seen=True,
            limit=False,
            fix="start without --fully-sharded-loras; row-parallel layers already shard B",
        )


def _selfcheck(device: torch.device, lora_config: Any, router_rows: int) -> str | None:
    if not HAS_TRITON:
        return "vLLM finds no working Triton"
    case = device, lora_config.lora_dtype, lora_config.max_lora_rank, router_rows
    return selfcheck(*case) or block_selfcheck(*case)
