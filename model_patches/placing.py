"""Where the parts of an adapter go in one model, and what must hold there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_lora_ext.adapters.checks import check_fits
from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.adapters.model import MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import layouts
from vllm_lora_ext.model_patches.dora import begun, finish_all, squares_of
from vllm_lora_ext.model_patches.layer_sizes import block_layers, own_sizes, sizes_of
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.logits import RoutedLogits
from vllm_lora_ext.model_patches.mlp import Block
from vllm_lora_ext.model_patches.names import Names
from vllm_lora_ext.model_patches.positions import Positions
from vllm_lora_ext.model_patches.rank_attention import RankAttention
from vllm_lora_ext.model_patches.residency import (
    HostAdapter,
    KeyedPart,
    Layout,
    Projections,
    one,
    pack_flat,
)
from vllm_lora_ext.model_patches.scope import Scope
from vllm_lora_ext.model_patches.stock_lane import StockLane
from vllm_lora_ext.model_patches.two_pass import TwoPass


class Placer:
    """What the layers of one model take; computed once, layers do not change.

    Args:
        model: the model, its layers wrapped.
        modules: name → LoRA layer; packed: name of a fused layer → names of its slices.
        blocks: name → MLP block that can hold experts.
        scope: what of an adapter is served.
        lane: what goes into layers of vLLM's own; an attribute too.
        max_rank, router_rows: what a slot holds.
        dtype: of the engine's LoRA weights; base_name: the served model.
        pinned: whether host copies are page-locked.
        graphs: whether the engine captures CUDA graphs.
        positions: where something may differ by token.
        two_pass: computes what a classifier reads; None: this server does not.
        attention: keeps what adapters attend to; None: this server does not.
        pooling: whether the model is served for pooling; adapters may then have been trained on
            the bare model, whose layers' names lack `model.`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Mapping[str, BaseLayerWithLoRA],
        packed: Mapping[str, list[str]],
        blocks: Mapping[str, Block],
        scope: Scope,
        lane: StockLane,
        max_rank: int,
        router_rows: int,
        dtype: torch.dtype,
        base_name: str,
        pinned: bool,
        graphs: bool,
        pooling: bool,
        positions: Positions,
        two_pass: TwoPass | None,
        attention: RankAttention | None,
    ) -> None:
        self._model_name = type(model).__name__
        self._modules, self._packed, self._blocks = modules, packed, blocks
        self._max_rank, self._router_rows = max_rank, router_rows
        self._dtype, self._base_name, self._pinned = dtype, base_name, pinned
        self._graphs, self._scope = graphs, scope
        self.lane, self._positions, self._two_pass = lane, positions, two_pass
        self._attention = attention
        # Prefixes of the layers that live on another pipeline rank.
        self._missing = tuple(
            f"{name}." for name, m in model.named_modules() if isinstance(m, PPMissingLayer)
        )
        self._shapes = sizes_of(modules, packed) | lane.shapes
        # Layers that an adapter can name, those with adapted parameters among them.
        known = self._shapes.keys() | {name.rpartition(".")[0] for name in lane.experts}
        self._names = Names(
            model, lambda name: name in known or name.startswith(self._missing), pooling
        )

    def knows(self, vllm_name: str) -> bool:
        """Whether a layer, or a slice of one, can be adapted in our form."""
        return vllm_name in self._shapes

    def wraps(self, vllm_name: str) -> bool:
        """Whether a layer, or a part of one, has a LoRA layer of any kind around it."""
        inside = (name for name in self._modules if vllm_name.startswith(f"{name}."))
        return self.knows(vllm_name) or vllm_name in self._modules or any(inside)

    def is_embedding(self, vllm_name: str) -> bool:
        """Whether a layer's A is looked up and not multiplied."""
        return isinstance(self._modules.get(vllm_name), VocabParallelEmbeddingWithLoRA)

    def place(self, adapter: RoutedAdapter, renamed: bool = False) -> HostAdapter:
        """The adapter in the form of this model's slots.

        Args:
            renamed: its layers already have vLLM's names.
        Raises:
            AdapterError: a layer is unknown, a shape differs, a rank or a router is too large, a
                value is too large for the slots, the model's MLP blocks cannot hold experts,
                no layer of it is served here,
                gates stand where none are computed, or the device has no room for routers.
        """
        template = adapter.template
        self._check_passes(adapter)
        every = (
            *adapter.modules, *block_layers(adapter), *(template.sizes if template else ()),
        )  # fmt: skip
        name_of = {n: n if renamed else self._names.layer(n) for n in every}
        name_of |= {n: n if renamed else self._names.parameter(n) for n in adapter.experts}
        _check_once(name_of)
        away = {n for n, v in name_of.items() if v.startswith(self._missing)}
        known = self._shapes.keys() | self.lane.experts.keys()
        has = away.union(n for n, v in name_of.items() if v in known)
        elsewhere = away
        if template is None:
            adapter = self._scope.narrowed(adapter, name_of, has)
        else:
            elsewhere = away | self._scope.left_out(template.sizes, name_of)
        self.lane.check(adapter, name_of, away)
        # The model's own names beside those of the adapter: for what an error says.
        shapes = {v: shape for v, shape in self._shapes.items() if v not in name_of}
        shapes |= {n: self._shapes[v] for n, v in name_of.items() if v in self._shapes}
        check_fits(
            adapter,
            shapes | own_sizes(adapter, elsewhere),
            self._dtype,
            self._max_rank,
            self._router_rows,
            self._base_name,
        )
        if template is not None:
            return HostAdapter(
                system=adapter.system, source=adapter.source, rank=adapter.rank,
                version=adapter.digest, nbytes=template.nbytes, sites={}, stock={}, blocks={},
                heads={}, names={}, template=template,
            )  # fmt: skip
        self._check_columns(adapter, name_of, away)
        return self._pack(adapter, name_of, away)

    def _check_columns(
        self, adapter: RoutedAdapter, name_of: Mapping[str, str], away: set[str]
    ) -> None:
        """What differs by token must meet rows that are positions of a request, and are known."""
        if not adapter.columns and adapter.classifier is None:
            return
        layer_of = {part: name for name, parts in self._packed.items() for part in parts}
        for name, module in adapter.modules.items():
            if not module.gate.columns or name in away:
                continue
            layer = self._modules[layer_of.get(name_of[name], name_of[name])]
            if not isinstance(layer, RoutedLogits):  # that knows its rows by itself
                self._positions.check(name, layer)
            if module.kind == "embedding" and self._graphs:
                raise AdapterError(
                    "unsupported_feature", "what the adapter adds to the embedding differs by"
                    " token, which no CUDA graph holds", seen=name,
                    limit="gates in linear layers and the output matrix",
                    fix="start with --enforce-eager",
                )  # fmt: skip

    def _check_passes(self, adapter: RoutedAdapter) -> None:
        """That the engine keeps and computes what the adapter needs beside its own rows: what it
        attends to, and the pass that its gates come from."""
        if adapter.attends:
            if self._attention is None:
                raise AdapterError(
                    "unsupported_feature", "the adapter attends to earlier tokens' A x, for whose"
                    " keys and values every token needs room in the KV cache",
                    seen=adapter.attends[0], limit='servers with the setting "rank_attention"',
                    fix="start the server with --additional-config '{\"lora_ext\":"
                    " {\"rank_attention\": {\"heads\": 4, \"head_size\": 32}}}'",
                )  # fmt: skip
            self._attention.check(adapter)
        if adapter.classifier is None:
            return
        if self._two_pass is None:
            raise AdapterError(
                "unsupported_feature", "the adapter's gates come from the base model's last hidden"
                " state of the token, for which every step with it runs the model twice and every"
                " token has a second KV cache", seen=adapter.system,
                limit='servers with the setting "two_pass"', fix="start the server with"
                " --additional-config '{\"lora_ext\": {\"two_pass\": true}}', or with the adapter"
                " in --lora-modules",
            )  # fmt: skip
        self._two_pass.check(adapter.classifier)

    def reserve(self, host: HostAdapter) -> None:
        """Slots have room for routers and scales from the first adapter on that needs them."""
        sites = [(self._modules[name].site, packed) for name, packed in host.sites.items()]
        sites += [(self._blocks[n].first.site, packed.first) for n, packed in host.blocks.items()]
        try:
            for site, packed in sites:
                site.reserve_routers(len(packed.router_GK))
                if packed.rescale_2N is not None:
                    site.reserve_rescale()
        except MemoryError as error:
            raise AdapterError(
                "device_memory_full", "the slots have no room for the adapter's routers or scales",
                seen=str(error), limit="what the device has left",
                fix="start with the setting max_router_rows, which reserves them before the KV"
                " cache takes the rest, or with a smaller --max-loras",
            ) from error  # fmt: skip

    def _pack(
        self, adapter: RoutedAdapter, name_of: Mapping[str, str], away: set[str]
    ) -> HostAdapter:
        found = {name_of[n]: (n, m) for n, m in adapter.modules.items() if n not in away}
        sites: Layout = {}
        stock: Layout = {}
        blocks: Layout = {}
        norms: dict[str, torch.Tensor] = {}
        attention: Projections = {}
        names: dict[str, tuple[str, ...]] = {}
        for layer_name, layer in self._modules.items():
            parts = [found.get(n) for n in self._packed.get(layer_name, [layer_name])]
            if not any(parts):
                continue
            names[layer_name] = tuple(p[0] for p in parts if p)
            modules = [p and p[1] for p in parts]
            if isinstance(layer, RoutedLinear):
                covered = zip(parts, layer.part_sizes(len(parts)), strict=True)
                names[layer_name] = tuple(p[0] for p, sizes in covered if p for _ in sizes)
                slices = layer.sharded(modules)
                squares_N = squares_of(layer_name, layer, slices)
                if squares_N is not None:
                    norms[layer_name] = squares_N
                _check_extended(layer_name, layer, slices)
                if adapter.attends and self._attention is not None:
                    own = self._attention.projections(layer_name, slices)
                    attention |= {layer_name: own} if own else {}
                    slices = [m and layouts.without_attention(m) for m in slices]
                sites[layer_name] = layouts.site(layer, begun(slices))
            elif not self.lane.packs(layer_name):
                stock[layer_name] = layouts.stock(names[layer_name][0], layer, modules, self._dtype)
        for name, block in adapter.blocks.items():
            first = f"{name}.{min(block.parts)}"
            if first not in away:
                block_name = name_of[first].rpartition(".")[0]
                names[block_name] = (name,)
                blocks[block_name] = layouts.block(self._block(name, block_name, block), block)
        experts, heads = self.lane.layouts(adapter, name_of, away)
        classifier = self._classifier(adapter)
        factors = {n: one(layouts.factors(found[n][1])) for n in stock if n in found and classifier}
        nbytes, packed = pack_flat([sites, stock | experts, blocks, heads, factors], self._pinned)
        whole = {n: norms.pop(n) for n in list(norms) if not self._modules[n].x_is_shard}
        finish_all(self._modules, packed[0], whole)
        return HostAdapter(
            system=adapter.system, source=adapter.source, rank=adapter.rank,
            version=adapter.digest,
            nbytes=nbytes + (classifier.nbytes if classifier else 0) + _bytes(attention),
            names=names,
            sites=packed[0], stock=packed[1], blocks=packed[2], heads=packed[3],
            on_base=bool(adapter.dora), norms=norms, attention=attention,
            parts=(KeyedPart(
                adapter.digest, columns=adapter.columns, linear=layouts.is_linear(adapter),
                frozen=classifier is not None and classifier.frozen,
            ),),
            factors=packed[4], classifier=classifier,
        )  # fmt: skip

    def place_formed(self, lora: LoRAModel, version: str) -> HostAdapter:
        """A model of vLLM's own, which `StockLane.form` has formed for the layers; what they do
        not have is left out, as stock does.

        Raises:
            AdapterError: `shape_mismatch`, `unsupported_feature`.
        """
        sites: Layout = {}
        stock: Layout = {}
        heads: Layout = {}
        names: dict[str, tuple[str, ...]] = {}
        for name, layer in self._modules.items():
            weights, head = self.lane.formed(lora, name)
            if head is not None:
                heads[name] = self.lane.head_layout(name, head)
            if weights is None:
                continue
            if self.lane.packs(name):
                stock[name] = self.lane.experts_layout(name, weights.lora_a, weights.lora_b)
                continue
            modules = layouts.modules_of(weights)
            names[name] = (name,) * sum(m is not None for m in modules)
            if isinstance(layer, RoutedLinear):
                sites[name] = layouts.formed_site(name, layer, modules)
            else:
                stock[name] = layouts.stock(name, layer, modules, self._dtype)
        nbytes, packed = pack_flat([sites, stock, heads], self._pinned)
        return HostAdapter(
            system="plain", source="", rank=lora.rank, version=version, nbytes=nbytes, names=names,
            sites=packed[0], stock=packed[1], blocks={}, heads=packed[2],
            parts=(KeyedPart(version),),
        )  # fmt: skip

    def _classifier(self, adapter: RoutedAdapter) -> Classifier | None:
        pin = (lambda t: t.pin_memory()) if self._pinned else (lambda t: t)
        return None if adapter.classifier is None else adapter.classifier.map(pin)

    def _block(self, name: str, vllm_name: str, experts: MixBlock) -> Block:
        if vllm_name not in self._blocks:
            raise AdapterError(
                "unsupported_feature", f"the adapter's experts are whole MLP blocks, and {name} is"
                " no block that can hold them", seen=self._model_name,
                limit="blocks that do first linear, activation, second linear and nothing else,"
                " without the settings extend_weights and fuse_activation",
                fix="serve it with the model it was trained on, and without these settings",
            )  # fmt: skip
        block = self._blocks[vllm_name]
        if self._graphs and not block.on_kernel(experts):
            raise AdapterError(
                "unsupported_feature", "the experts of this MLP block take the PyTorch path, which"
                " CUDA graphs cannot hold", seen=name,
                limit="activations that the kernel knows, and weights that sum to one where the"
                " second linear has a bias", fix="start with --enforce-eager",
            )  # fmt: skip
        return block


def _check_once(name_of: Mapping[str, str]) -> None:
    """Raises AdapterError `duplicate_tensor` where two names of an adapter mean one layer."""
    first: dict[str, str] = {}
    for name, vllm_name in name_of.items():
        if first.setdefault(vllm_name, name) != name:
            raise AdapterError(
                "duplicate_tensor", "two names of the adapter mean one layer of the model",
                seen=f"{first[vllm_name]}, {name}", limit=vllm_name,
                fix="remove one of them from the adapter",
            )  # fmt: skip


def _check_extended(name: str, layer: RoutedLinear, slices: Sequence[RoutedModule | None]) -> None:
    """Raises AdapterError `unsupported_feature` for a router that no extended weight has."""
    if layer.site.extension is not None and any(s and s.norm is not None for s in slices):
        raise AdapterError(
            "unsupported_feature", "the adapter's router reads a normalised input, which a product"
            " with rows below the base weight does not give", seen=name,
            limit="servers without the setting extend_weights",
            fix="start without the setting extend_weights",
        )  # fmt: skip


def _bytes(attention: Projections) -> int:
    return sum(own.weight_PR.nbytes for found in attention.values() for own in found.values())
