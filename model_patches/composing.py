"""Adapters that are made of others in their slots' form, without reading or checking them again.

Ranks of the parts stand one after the other; a scale that is constant over a request is folded
into B, one that differs by token is a column of the slot, which multiplies the part's ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_lora_ext.adapters.finite import is_finite
from vllm_lora_ext.adapters.limits import RANKS, slot_rank
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, Shape
from vllm_lora_ext.kernels.gated_lora.step import MAX_COLUMNS
from vllm_lora_ext.kernels.mix_mlp.plan import PackedBlock
from vllm_lora_ext.model_patches.layers import RoutedEmbedding, RoutedLinear
from vllm_lora_ext.model_patches.logits import RoutedLogits
from vllm_lora_ext.model_patches.mlp import Block
from vllm_lora_ext.model_patches.positions import Positions
from vllm_lora_ext.model_patches.residency import HostAdapter, KeyedPart, flat_views


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a composed one.

    Args:
        name: as a request names it.
        version: of the adapter and of what was folded into it before.
        scale, by_row: as in `KeyedPart`; the scale of one that goes by row is 1.
    """

    name: str
    version: str
    host: HostAdapter
    scale: float
    by_row: bool

    @property
    def part(self) -> KeyedPart:
        """What the keys of the prefix cache must know of it."""
        (own,) = self.host.parts
        return replace(own, version=self.version, scale=self.scale, by_row=self.by_row)


class _Place(NamedTuple):
    """An ingredient, the column that multiplies it (-1: none), and where its own columns begin."""

    ingredient: Ingredient
    factor: int
    own: int


class _Matrix(NamedTuple):
    """An embedding, whose A the slot holds transposed, or the output matrix."""

    a: torch.Tensor
    b: torch.Tensor
    factors: list[int]
    embedding: bool

    def into(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Itself in other memory, as `HostAdapter.stock` has it."""
        a.copy_(self.a)
        return (a.t() if self.embedding else a), b.copy_(self.b)


class Composer:
    """Composes for one model.

    Args:
        modules: name → LoRA layer; blocks: name → MLP block.
        max_rank, router_rows: what a slot holds.
        positions: where something may differ by token.
        pinned: whether host copies are page-locked; graphs: whether the engine captures graphs.
    """

    def __init__(
        self,
        modules: Mapping[str, BaseLayerWithLoRA],
        blocks: Mapping[str, Block],
        max_rank: int,
        router_rows: int,
        positions: Positions,
        pinned: bool,
        graphs: bool,
    ) -> None:
        self._modules, self._blocks = modules, blocks
        self._max_rank, self._router_rows = max_rank, router_rows
        self._positions, self._pinned, self._graphs = positions, pinned, graphs

    def compose(self, ingredients: Sequence[Ingredient], version: str, name: str) -> HostAdapter:
        """One adapter that adds what all of them add.

        Args:
            version: of the whole; name: what errors and listings call it.
        Raises:
            AdapterError: a slot has no room for so many ranks, router rows or columns; experts
                that are whole MLP blocks meet another adapter; columns are needed where rows are
                no positions.
        """
        parts = tuple(i.part for i in ingredients)
        starts = list(accumulate((part.width for part in parts), initial=0))
        _check_columns(starts[-1])
        self._check_blocks(ingredients)
        self._check_dora(ingredients)
        for ingredient in ingredients:
            self._check_own(ingredient)
        places = [
            _Place(i, start if i.by_row else -1, start + i.by_row)
            for i, start in zip(ingredients, starts, strict=False)
        ]
        layers = dict.fromkeys(n for i in ingredients for n in (*i.host.sites, *i.host.stock))
        linears = [n for n in layers if isinstance(self._modules[n], RoutedLinear)]
        site_parts = {
            n: [(p.ingredient.host.sites.get(n), p.ingredient.scale, p.factor, p.own)
                for p in places]
            for n in linears
        }  # fmt: skip
        for layer in linears:
            self._check_site(layer, [p[0] for p in site_parts[layer] if p[0]], starts[-1])
        matrices = {n: self._matrix(n, places) for n in layers if n not in site_parts}
        groups = [self._shapes(n, of) for n, of in site_parts.items()]
        groups += [[(tuple(t.shape), t.dtype) for t in m[:2]] for m in matrices.values()]
        by_row = matrices if starts[-1] else {}
        groups += [[((len(m.factors),), torch.int64)] for m in by_row.values()]
        blocks = {n: p for p in places for n in p.ingredient.host.blocks}
        groups += [self._blocks[n].site.tables.scaled_shapes() for n in blocks]
        nbytes, views = flat_views(groups, self._pinned)
        left = iter(views)
        sites = {n: self._modules[n].site.compose(of, next(left)) for n, of in site_parts.items()}
        stock: dict[str, tuple[torch.Tensor, ...]] = {
            n: m.into(*next(left)) for n, m in matrices.items()
        }
        factors = {n: next(left)[0].copy_(torch.tensor(m.factors)) for n, m in by_row.items()}
        scaled = {n: self._scaled(n, p, next(left)) for n, p in blocks.items()}
        for layer, packed in sites.items():
            for _, plan in packed.slices if packed is not None else ():
                _check_finite(layer, plan.bt_RN, ingredients)
        for layer, (_, b) in stock.items():
            _check_finite(layer, b, ingredients)
        return HostAdapter(
            system="+".join(dict.fromkeys(i.host.system for i in ingredients)), source=name,
            rank=max(i.host.rank for i in ingredients), version=version,
            nbytes=nbytes + sum(map(_block_bytes, scaled.values())),
            sites={n: packed for n, packed in sites.items() if packed is not None},
            stock=stock, blocks=scaled, heads={}, names=_names(linears, places), parts=parts,
            on_base=any(i.host.on_base for i in ingredients), factors=factors,
        )  # fmt: skip

    def _scaled(self, name: str, place: _Place, out: Sequence[torch.Tensor]) -> PackedBlock:
        """An ingredient's experts at a block, as they act in the whole."""
        packed = place.ingredient.host.blocks[name]
        return self._blocks[name].site.scaled(packed, place.ingredient.scale, place.factor, out)

    def _shapes(self, layer: str, parts: list[Any]) -> list[Shape]:
        try:
            shapes: list[Shape] = self._modules[layer].site.composed_shapes(parts)
        except ValueError as error:  # of the kernels, beside what was checked here
            raise AdapterError(
                "unsupported_feature", f"the adapters of the request do not go into one slot at"
                f" {layer}", seen=str(error), fix="name fewer adapters",
            ) from error  # fmt: skip
        return shapes

    def _matrix(self, name: str, places: Sequence[_Place]) -> _Matrix:
        here = [p for p in places if name in p.ingredient.host.stock]
        pairs: list[Any] = [p.ingredient.host.stock[name] for p in here]
        embedding = isinstance(self._modules[name], RoutedEmbedding)
        a = torch.cat([a for a, _ in pairs])
        scales = [p.ingredient.scale for p in here]
        b = torch.cat(
            [(b.float() * s).to(b.dtype) for (_, b), s in zip(pairs, scales, strict=True)], dim=1
        )
        self._check_rank(name, b.shape[1])
        if self._graphs and embedding and any(p.factor >= 0 for p in here):
            raise AdapterError(
                "unsupported_feature", "an adapter that adapts the embedding differs by token,"
                " which no CUDA graph holds", seen=name, limit="adapters of linear layers",
                fix="start with --enforce-eager, or leave the spans out",
            )  # fmt: skip
        factors = [
            p.factor for (_, b), p in zip(pairs, here, strict=True) for _ in range(b.shape[1])
        ]
        return _Matrix(a.t() if embedding else a, b, factors, embedding)

    def _check_site(self, layer: str, parts: Sequence[PackedSite], columns: int) -> None:
        ranks: dict[int, int] = {}
        rows: dict[int, int] = {}
        for number, plan in (s for part in parts for s in part.slices):
            ranks[number] = ranks.get(number, 0) + len(plan.bt_RN)
            rows[number] = rows.get(number, 0) + plan.gate.router_rows
        self._check_rank(layer, max(ranks.values()))
        if max(rows.values()) > self._router_rows:
            raise AdapterError(
                "router_too_large", f"the routers of the adapters together have too many rows at"
                f" {layer}", seen=max(rows.values()), limit=f"max_router_rows {self._router_rows}",
                fix="start the server with --additional-config "
                f"'{{\"lora_ext\": {{\"max_router_rows\": {max(rows.values())}}}}}'",
            )  # fmt: skip
        if columns:
            self._positions.check(layer, self._modules[layer])

    def _check_rank(self, layer: str, rank: int) -> None:
        if rank > self._max_rank:
            enough = slot_rank(rank)
            raise AdapterError(
                "rank_too_large", f"the adapters of the request together have too large a rank at"
                f" {layer}", seen=rank, limit=f"--max-lora-rank {self._max_rank}",
                fix=f"start the server with --max-lora-rank {enough}" if enough
                else f"name fewer adapters: vLLM stops at rank {RANKS[-1]}",
            )  # fmt: skip

    def _check_own(self, ingredient: Ingredient) -> None:
        """Only into layers of our own can several adapters go."""
        layers = [n for n in ingredient.host.stock if not self._is_matrix(n)]
        layers += ingredient.host.heads
        if layers:
            raise AdapterError(
                "unsupported_feature", "a classification head or fused experts cannot be scaled,"
                f" nor stand beside another adapter: {ingredient.name}", seen=layers[0],
                limit="linear layers, embedding and output matrix",
                fix="name the adapter alone, as the request's model",
            )  # fmt: skip

    def _is_matrix(self, layer: str) -> bool:
        return isinstance(self._modules[layer], RoutedEmbedding | RoutedLogits)

    def _check_blocks(self, ingredients: Sequence[Ingredient]) -> None:
        """A block's linears hold its experts, and nothing beside them."""
        for ingredient in ingredients:
            for name in ingredient.host.blocks:
                block = self._blocks[name]
                inside = {n for n, m in self._modules.items() if m in (block.first, block.last)}
                if ingredient.by_row:
                    self._positions.check(name, block.first)
                for other in ingredients:
                    meets = name in other.host.blocks or inside & set(other.host.sites)
                    if other is not ingredient and meets:
                        raise AdapterError(
                            "unsupported_feature", "experts that are whole MLP blocks (MixLoRA)"
                            f" share their block with another adapter: {name}",
                            seen=f"{ingredient.name} and {other.name}",
                            limit="one adapter where such experts are",
                            fix="leave one of them out",
                        )  # fmt: skip

    def _check_dora(self, ingredients: Sequence[Ingredient]) -> None:
        """What rescales a layer's output is the only adapter there, as it was trained."""
        for ingredient in ingredients:
            host = ingredient.host
            layer = next((n for n, p in host.sites.items() if p.rescale_2N is not None), None)
            if layer is None:
                continue
            others = [i for i in ingredients if i is not ingredient]
            meets = [i.name for i in others if host.sites.keys() & i.host.sites.keys()]
            if ingredient.scale != 1.0 or ingredient.by_row or meets:
                how = meets or (["spans"] if ingredient.by_row else [f"scale {ingredient.scale}"])
                raise AdapterError(
                    "unsupported_feature", "a DoRA is no difference: it cannot be scaled, come and"
                    " go with the tokens, nor share a layer with another adapter",
                    seen=f"{ingredient.name} with {', '.join(how)}",
                    limit="scale 1, no spans, layers of its own",
                    fix="name it alone, as the request's model",
                )  # fmt: skip


def _check_finite(layer: str, b: torch.Tensor, ingredients: Sequence[Ingredient]) -> None:
    """Parts were finite when they were loaded; a scale may have made them too large."""
    if not is_finite(b):
        raise AdapterError(
            "overflow", f"a scale makes values of B at {layer} too large for {b.dtype}",
            seen=", ".join(f"{i.name} * {i.scale:g}" for i in ingredients),
            limit=torch.finfo(b.dtype).max, fix="lower the scales",
        )  # fmt: skip


def _check_columns(count: int) -> None:
    if count > MAX_COLUMNS:
        raise AdapterError(
            "unsupported_feature", "the adapters of the request together have too many numbers"
            " that differ by token", seen=count, limit=MAX_COLUMNS, fix="name fewer adapters",
        )  # fmt: skip


def _block_bytes(block: Any) -> int:
    """Held twice only while the adapter that it comes from is loaded."""
    sites = [site for site in (block.first, block.last) if site is not None]
    tensors = [t for s in sites for t in (s.a_RK, s.router_GK, *s.stored)]
    return sum(tensor.nbytes for tensor in tensors)


def _names(linears: Collection[str], places: Sequence[_Place]) -> dict[str, tuple[str, ...]]:
    """What the adapters' files call a layer's parts, in the order of a composed site's plans; with
    the adapter's name in front where several meet."""
    names: dict[str, tuple[str, ...]] = {}
    for layer in dict.fromkeys(n for p in places for n in p.ingredient.host.names):
        here = [p for p in places if layer in p.ingredient.host.names]
        if len(here) == 1:
            names[layer] = here[0].ingredient.host.names[layer]
        elif layer in linears:
            names[layer] = _plan_names(layer, here)
        else:
            names[layer] = tuple(n for p in here for n in _own_names(layer, p))
    return names


def _plan_names(layer: str, places: Sequence[_Place]) -> tuple[str, ...]:
    """As `kernels.gated_lora.compose` orders plans: by slice, those of no gate and of one factor
    together and first."""
    pieces: list[tuple[int, bool, int, str]] = []
    for p in places:
        plans = p.ingredient.host.sites[layer].slices if p.ingredient.scale else ()
        for (i, plan), name in zip(plans, _own_names(layer, p), strict=False):
            gated = plan.gate.source != "none"
            pieces.append((i, gated, len(pieces) if gated else p.factor, name))
    groups = groupby(sorted(pieces), lambda piece: piece[:3])
    return tuple("+".join(name for *_, name in group) for _, group in groups)


def _own_names(layer: str, place: _Place) -> list[str]:
    ingredient = place.ingredient
    return [f"{ingredient.name}/{name}" for name in ingredient.host.names[layer]]
