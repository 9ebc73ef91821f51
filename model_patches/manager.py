"""The manager of the model's LoRA layers: puts whole adapters into slots, and takes them out.

Reached through `WorkerLoRAManager._manager_cls` (see `worker`), which is vLLM's own way to name a
manager class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA, ClassificationHeadWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import PIN_MEMORY

from vllm_lora_ext.adapters.template import Template
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import Site, prefetch_in_order
from vllm_lora_ext.kernels.gated_lora.backends.base import Backend
from vllm_lora_ext.kernels.gated_lora.optional_selfcheck import selfcheck as optional_selfcheck
from vllm_lora_ext.kernels.gated_lora.selfcheck import selfcheck
from vllm_lora_ext.kernels.gated_lora.sharded import may_sum
from vllm_lora_ext.kernels.gated_lora.step import MAX_COLUMNS
from vllm_lora_ext.kernels.mix_mlp import warm_blocks
from vllm_lora_ext.kernels.mix_mlp.selfcheck import selfcheck as block_selfcheck
from vllm_lora_ext.model_patches.backend import (
    Building,
    build_with,
    check_graphs,
    check_optional,
    choose_backend,
)
from vllm_lora_ext.model_patches.columns import RowColumns
from vllm_lora_ext.model_patches.composing import Composer
from vllm_lora_ext.model_patches.config import check_config, check_trace
from vllm_lora_ext.model_patches.graphs import capture_apart
from vllm_lora_ext.model_patches.heap import keep_memory
from vllm_lora_ext.model_patches.instruction import InstructionPass
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.logits import follow_rows
from vllm_lora_ext.model_patches.mlp import share_scratch, wrap_blocks
from vllm_lora_ext.model_patches.placing import Placer
from vllm_lora_ext.model_patches.positions import Positions
from vllm_lora_ext.model_patches.products import guard_steps
from vllm_lora_ext.model_patches.punica import skip_unread
from vllm_lora_ext.model_patches.rank_attention import RankAttention
from vllm_lora_ext.model_patches.residency import HeadWeights, HostAdapter
from vllm_lora_ext.model_patches.rows import Rows, unknown_rows
from vllm_lora_ext.model_patches.scope import Scope, on_encoder_rows
from vllm_lora_ext.model_patches.stock_lane import StockLane, expert_tables, put
from vllm_lora_ext.model_patches.trace import Recorder
from vllm_lora_ext.model_patches.two_pass import TwoPass
from vllm_lora_ext.settings import USUAL_EXPERTS


class RoutedLoRAModel(LoRAModel):
    """An adapter in host form under vLLM's id."""

    def __init__(self, lora_model_id: int, host: HostAdapter) -> None:
        super().__init__(lora_model_id, host.rank, {})
        self.host = host
        self.sums: bool | None = None  # not known yet

    def clone(self, lora_model_id: int) -> RoutedLoRAModel:
        return RoutedLoRAModel(lora_model_id, self.host)


class RoutedLoRAModelManager(LRUCacheLoRAModelManager):
    """Stock's LRU manager; what gets into a slot, how, and what must leave for it, is ours.

    Attributes:
        pinned: ids that keep their slot, also over `remove_all_adapters`.
        placer: makes the host form of an adapter for this model; composer: of several, one.
        rows: which rows of a step belong to which request.
    """

    def __init__(
        self,
        model: Any,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        vocab_size: int,
        lora_config: Any,
        device: torch.device,
        vllm_config: Any,
    ) -> None:
        settings = check_config(vllm_config, lora_config)
        router_rows = settings.router_rows(lora_config.max_lora_rank)
        self.base_name = vllm_config.model_config.model
        device_type = vllm_config.device_config.device_type
        self._elsewhere = on_encoder_rows(model)
        backend = choose_backend(
            settings.triton, device_type,
            lambda: _selfcheck(device, lora_config, router_rows),
        )  # fmt: skip
        if backend.on_device:
            check_optional(
                settings.of_kernels,
                lambda: optional_selfcheck(
                    device, lora_config.lora_dtype, lora_config.max_lora_rank, router_rows,
                    settings.extend_weights > 0, settings.fuse_activation,
                    settings.prefetch_weights,
                ),
            )  # fmt: skip
        graphs = vllm_config.compilation_config.cudagraph_mode
        self.graphs = check_graphs(graphs and graphs.name, device_type, backend.on_device)
        if device_type == "cpu":
            keep_memory()
            guard_steps()
        self.pinned: set[int] = set()
        extend = settings.extend_weights if backend.on_device else 0.0
        with build_with(Building(router_rows, backend, self.graphs, extend)):
            super().__init__(
                model, max_num_seqs, max_num_batched_tokens, vocab_size, lora_config, device,
                vllm_config,
            )  # fmt: skip
        if settings.max_router_rows is not None:  # asked for: before the KV cache takes the rest
            _reserve_routers(self.modules)
        self.rows = Rows(self)
        step = next(iter(self.punica_wrapper_mapping.values())).step_map  # the language model's
        self._two_pass: TwoPass | None = None
        if settings.two_pass:
            step.columns = settings.max_gates or _usual_gates(self.modules.values())
            assert len(step.rows_TC)  # made now, before the KV cache takes the rest
            self._two_pass = TwoPass(self.model, step, self.rows, vllm_config)
        self._attention: RankAttention | None = None
        if settings.rank_attention:
            self._attention = RankAttention(
                self.model, self.modules, step, settings.rank_attention, vllm_config
            )
        self._columns: RowColumns | None = None
        self._max_model_len = vllm_config.model_config.max_model_len
        follow_rows(self.rows, self.modules)
        skip_unread(self.punica_wrapper_mapping.values(), self.modules.values())
        fuse = settings.fuse_activation and backend.on_device
        self.blocks = wrap_blocks(self.model, self.modules, fuse)
        share_scratch(self.blocks.values(), vllm_config.model_config.dtype)
        pinned = device_type == "cuda" and PIN_MEMORY
        text = next(iter(self.punica_wrapper_mapping.values()))  # the language model's is first
        positions = Positions(text, unknown_rows(vllm_config))
        self.placer = Placer(
            self.model, self.modules, self.packed_modules, self.blocks,
            Scope(
                self.model, lora_config.target_modules, self.packed_modules_mapping,
                towers=getattr(self, "supports_tower_connector_lora", False),
            ),
            StockLane(self),
            lora_config.max_lora_rank, router_rows, lora_config.lora_dtype, self.base_name,
            pinned=pinned, graphs=self.graphs,
            pooling=self.is_pooling_model, positions=positions, two_pass=self._two_pass,
            attention=self._attention,
        )  # fmt: skip
        self.composer = Composer(
            self.modules, self.blocks, lora_config.max_lora_rank, router_rows, positions, pinned,
            self.graphs,
        )  # fmt: skip
        sites = [m.site for m in self.modules.values() if isinstance(m, RoutedLinear)]
        if settings.prefetch_weights and backend.on_device:
            prefetch_in_order(sites)  # models register their layers as they run them
        self._warm(sites, backend, vllm_config)
        if self.graphs and any(map(may_sum, sites)):
            capture_apart(self, vllm_config)
        self.recorder: Recorder | None = None
        if settings.trace:
            check_trace(vllm_config, self.graphs)
            self.recorder = Recorder(self)

    def _match_target_modules(self, module_name: str) -> bool:
        if module_name.startswith(self._elsewhere):
            return False
        found: bool = super()._match_target_modules(module_name)
        return found

    def _warm(self, sites: list[Site], backend: Backend, vllm_config: Any) -> None:
        """Compiles all that a step can need, while nobody waits and no row has an adapter."""
        options = (
            vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.dtype,
        )  # fmt: skip
        backend.warm(sites, *options)
        warm_blocks([block.site for block in self.blocks.values()], *options)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of A and B that an adapter of the largest rank on all layers has."""
        tables = [table for layer in self.modules.values() for table in _tables(layer)]
        return sum(table[0].nbytes for table in tables)

    def sums(self, lora_ids: Iterable[int]) -> bool:
        """Whether a gate of these adapters reads a sum over the ranks; True if one is not here."""
        models = (self._registered_adapters.cache.get(lora_id) for lora_id in lora_ids)
        return any(self._sums(model) for model in models)

    def _sums(self, model: LoRAModel | None) -> bool:
        if not isinstance(model, RoutedLoRAModel):
            return model is None  # vLLM's own have no gates
        if model.sums is None:
            sites = model.host.sites.items()
            model.sums = any(self.modules[n].reduces and packed.reads_x for n, packed in sites)
        return model.sums

    def has_slots(self, needed: Collection[int]) -> bool:
        """Whether these adapters can be in slots at once, beside the pinned ones."""
        return len(self.pinned.union(needed)) <= self.lora_slots

    def register(self, lora: LoRAModel, needed: Collection[int] = ()) -> bool:
        """Into vLLM's cache, its oldest out when it is full.

        Args:
            needed: ids that must not leave; pinned ones never do.
        Returns:
            False, and nothing done, when nothing may leave.
        """
        if lora.id not in self._registered_adapters and len(self) >= self.capacity:
            oldest = self._oldest(self._registered_adapters, needed)
            if oldest is None:
                return False
            self.remove_adapter(oldest)
        self.add_adapter(lora)
        return True

    def make_slot(self, needed: Collection[int]) -> None:
        """Frees a slot if there is none: of the adapter that was not used for the longest time.

        Raises:
            AdapterError: `slots_pinned`, all are pinned or `needed`.
        """
        if None in self.lora_index_to_id:
            return
        oldest = self._oldest(self._active_adapters, needed)
        if oldest is None:
            raise slots_pinned(len(self.pinned), self.lora_slots)
        self.deactivate_adapter(oldest)

    def _oldest(self, cache: Any, needed: Collection[int]) -> int | None:
        return next((i for i in cache.order if i not in needed and i not in self.pinned), None)

    def touch(self, lora_id: int) -> None:
        """The adapter is used now."""
        self._registered_adapters.touch(lora_id)
        self._active_adapters.touch(lora_id)

    def active_ids(self) -> set[int]:
        """Adapters that are in slots."""
        return set(self._active_adapters.order)

    def is_active(self, lora_id: int) -> bool:
        """Whether the adapter is in a slot."""
        return lora_id in self._active_adapters

    def expect_instructions(self, template_of: Callable[[int], Template | None]) -> None:
        """From now on steps with rows of an instruction pool what its gate is made of."""
        if self.rows.instruction is None:
            InstructionPass(self.rows, self.model, template_of)

    def expect_columns(self) -> None:
        """From now on steps fill the table of the numbers that come with each row."""
        if self._columns is None:
            step = next(iter(self.punica_wrapper_mapping.values())).step_map
            self._columns = RowColumns(self.rows, step, self._max_model_len)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, RoutedLoRAModel):
            self._registered_adapters[lora.id] = lora
        else:  # a warm-up's dummy
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Puts a registered adapter into a slot by asynchronous copies; all of it, or nothing and
        the error."""
        if lora_id in self._active_adapters:
            return False
        self.make_slot(())
        model = self._registered_adapters[lora_id]
        slot = self.lora_index_to_id.index(None)
        try:
            if isinstance(model, RoutedLoRAModel):
                self._load(slot, model.host)
                self._active_adapters[lora_id] = None
                self.lora_index_to_id[slot] = lora_id
            else:
                super().activate_adapter(lora_id)
        except BaseException:
            self._active_adapters.pop(lora_id, None)
            self._reset_slot(slot)
            raise
        self._registered_adapters.touch(lora_id)
        return True

    def _load(self, slot: int, host: HostAdapter) -> None:
        for name, layer in self.modules.items():
            if isinstance(layer, RoutedLinear):
                layer.site.load(slot, host.sites.get(name))
            elif name in host.stock:
                put(layer, slot, host.stock[name])
                if name in host.factors:
                    layer.factors.set(slot, host.factors[name])
            else:
                layer.reset_lora(slot)
            if isinstance(layer, ClassificationHeadWithLoRA):
                _set_head(layer, slot, host.heads.get(name))
        for name, block in host.blocks.items():
            self.blocks[name].site.load(slot, block)
        if self._two_pass is not None:
            self._two_pass.load(slot, host.classifier)
        if self._attention is not None:
            self._attention.load(slot, host.attention)

    def pin_adapter(self, lora_id: int) -> bool:
        """Keeps a registered adapter in its slot.

        Raises:
            AdapterError: `slots_pinned`.
        """
        if not self.has_slots({lora_id}):
            raise slots_pinned(len(self.pinned), self.lora_slots)
        if lora_id not in self._registered_adapters:
            raise ValueError(f"Pinning failed. LoRA {lora_id} is not registered.")
        self.activate_adapter(lora_id)
        self.pinned.add(lora_id)
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self._reset_slot(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)

    def remove_all_adapters(self) -> None:
        filled = [slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None]
        super().remove_all_adapters()
        for slot in filled:
            self._reset_slot(slot)

    def follow_base(self) -> None:
        """To be called when vLLM has replaced the base weights."""
        for layer in self.modules.values():
            if isinstance(layer, RoutedLinear):
                layer.follow_base()

    def _reset_slot(self, slot: int) -> None:
        for layer in self.modules.values():
            layer.reset_lora(slot)
            if isinstance(layer, ClassificationHeadWithLoRA):
                layer.reset_module_to_save(slot)
        for block in self.blocks.values():
            block.site.clear(slot)
        if self._two_pass is not None:
            self._two_pass.load(slot, None)
        if self._attention is not None:
            self._attention.load(slot, {})


def _usual_gates(layers: Iterable[BaseLayerWithLoRA]) -> int:
    """Numbers that come with a row: 16 experts for each layer that an adapter can name."""
    slices = [len(m.site.slice_sizes) for m in layers if isinstance(m, RoutedLinear)]
    return max(MAX_COLUMNS, USUAL_EXPERTS * sum(slices))


def _tables(layer: Any) -> list[torch.Tensor]:
    """A and B of all slots, slots first."""
    if isinstance(layer, RoutedLinear):
        return [layer.site.a_SRK, *layer.site.bt_SRN]
    if isinstance(layer, FusedMoEWithLoRA):
        return expert_tables(layer)
    own = layer.lora_a_stacked, layer.lora_b_stacked
    found = [table for part in own for table in (part if isinstance(part, tuple) else (part,))]
    return [*found, *([layer.full_weight_stacked] if hasattr(layer, "full_weight_stacked") else [])]


def _set_head(layer: ClassificationHeadWithLoRA, slot: int, weights: HeadWeights | None) -> None:
    if weights is None:
        layer.reset_module_to_save(slot)
    else:
        layer.set_module_to_save(slot, *weights)


def slots_pinned(pinned: int, slots: int) -> AdapterError:
    """The error for an adapter that can get no slot."""
    return AdapterError(
        "slots_pinned", "every slot that the adapter could have is pinned to another adapter",
        seen=f"{pinned} pinned", limit=f"--max-loras {slots}",
        fix="start with a larger --max-loras, or remove a pinned adapter",
    )  # fmt: skip


def _selfcheck(device: torch.device, lora_config: Any, router_rows: int) -> str | None:
    if not HAS_TRITON:
        return "vLLM finds no working Triton"
    case = device, lora_config.lora_dtype, lora_config.max_lora_rank, router_rows
    return selfcheck(*case) or block_selfcheck(*case)


def _reserve_routers(modules: Mapping[str, BaseLayerWithLoRA]) -> None:
    for layer in modules.values():
        if isinstance(layer, RoutedLinear):
            layer.site.reserve_routers(layer.site.most_routers)
