"""Adapters between "checked" and "in a slot": host copies in the form in which a slot holds them.

An adapter is read, checked, cut to this rank's shard and cast once, when it is loaded. From then
on it stands in flat memory, page-locked where there is a GPU, and going into a slot is copies
only: no step reads a disk, hashes or casts. What stays and what goes is a matter of bytes.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.adapters.template import Template
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.plan import PackedSite, Shape
from vllm_lora_ext.kernels.mix_mlp.plan import PackedBlock


@dataclass(frozen=True)
class Projection:
    """What makes q, k and v of A x in one slice of a layer (`rank_attention`).

    Args:
        weight_PR: [3 R, R] fp32, as the adapter has it.
        heads: of R / heads numbers each.
    """

    weight_PR: torch.Tensor = field(repr=False)
    heads: int


Projections = dict[str, dict[int, Projection]]
"""Of one adapter: vLLM's name of a layer → number of the slice → what it has there."""


# Arguments of vLLM's `set_lora`, of fused experts one tensor for each of the layer's tables; and
# arguments of `set_module_to_save`.
Weights = tuple[torch.Tensor, ...]
HeadWeights = tuple[torch.Tensor, torch.Tensor | None]
# By name, what is to stand in flat memory, and what puts it there and makes something of it.
Fill = Callable[[list[torch.Tensor]], Any]
Layout = dict[str, tuple[list[Shape], Fill]]

_ALIGN = 256  # bytes: more than any dtype or vector load asks for
_PIECE = {True: 64 << 20, False: sys.maxsize}  # bytes, of page-locked memory and of other


@dataclass(frozen=True)
class KeyedPart:
    """What the keys of the prefix cache must know of one adapter in a slot; plain values.

    Args:
        version: of all that does not differ by token.
        scale: folded into it beside that.
        by_row: a column of its own multiplies it: the first of its columns in the slot.
        columns: the adapter's own, which follow.
        linear: its own columns multiply it: where all are 0, it adds nothing.
        frozen: what it adds behind a prompt depends on where the prompt ends.
    """

    version: str
    scale: float = 1.0
    by_row: bool = False
    columns: tuple[Column, ...] = ()
    linear: bool = True
    frozen: bool = False

    @property
    def width(self) -> int:
        """Its columns in the slot."""
        return int(self.by_row) + len(self.columns)


@dataclass(frozen=True)
class HostAdapter:
    """One adapter for one model, ready for a slot.

    Args:
        system, source, rank: as the adapter has them.
        version: content digest, the same on every rank.
        nbytes: of host memory.
        sites: vLLM's name of a linear layer → its part.
        stock: name of an embedding, output matrix, classification head or layer of fused experts,
            whose slots are vLLM's own → what goes into them (`Weights`).
        heads: name of the classification head → weight [labels, in] and bias [labels] or None.
        blocks: name of an MLP block → its experts.
        names: layer or block → what the adapter's files call its parts, in their order; of a linear
            layer one name for each adapted slice.
        parts: the adapters that it is made of; one that is loaded has one, a template none.
        factors: name of an embedding or output matrix → int64 [R], the column that multiplies each
            rank, -1: none; where a column does.
        template: it goes into no slot before it is derived, and has nothing of the above.
        classifier: gives the gates of its rows, from a first pass of the step.
        on_base: whether it holds what was computed from the base weights (DoRA).
        attention: name of a linear layer → what makes its slices attend to earlier tokens.
        norms: name of a linear layer → this rank's part of a sum over the ranks without which its
            site is not ready (`dora`).
    """

    system: str
    source: str
    rank: int
    version: str
    nbytes: int
    sites: dict[str, PackedSite] = field(repr=False)
    stock: dict[str, Weights] = field(repr=False)
    heads: dict[str, HeadWeights] = field(repr=False)
    blocks: dict[str, PackedBlock] = field(repr=False)
    names: dict[str, tuple[str, ...]] = field(repr=False)
    parts: tuple[KeyedPart, ...] = ()
    factors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    template: Template | None = field(default=None, repr=False)
    classifier: Classifier | None = field(default=None, repr=False)
    on_base: bool = False
    attention: Projections = field(default_factory=dict, repr=False)
    norms: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def columns(self) -> int:
        """Columns of its slot."""
        return sum(part.width for part in self.parts)

    @property
    def understands(self) -> dict[str, Any]:
        """What a request may say to it, as plain values."""
        own = self.parts[0].columns if len(self.parts) == 1 else ()
        return {
            "columns": [column.to_dict() for column in own],
            "user": self.template.user if self.template else None,
            "instruction": bool(self.template and self.template.instruction),
        }


@dataclass(frozen=True)
class LoadReport:
    """What one rank answers to a load; plain values, so that every executor can carry them.

    Args:
        version: content digest, the same on every rank.
        bytes: host memory that this rank holds for it.
        evicted: ids whose host copies this rank has dropped to make room.
        parts: of what stands in the slot; none: requests do not name it as it is.
        understands: what a request may say to it (`HostAdapter.understands`).
    """

    version: str
    bytes: int
    system: str
    rank: int
    evicted: tuple[int, ...] = ()
    parts: tuple[KeyedPart, ...] = ()
    understands: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """In place of an adapter's source: what a worker was told to read ahead of time."""


@dataclass(frozen=True)
class Resident:
    """A vLLM LoRA model of any kind that stays in host memory, and what is said of it."""

    model: Any
    version: str
    nbytes: int
    system: str

    @property
    def host(self) -> HostAdapter | None:
        """Its host form; None for what stands in layers of stock's."""
        return getattr(self.model, "host", None)

    def report(self, evicted: tuple[int, ...] = ()) -> LoadReport:
        parts: tuple[KeyedPart, ...] = (KeyedPart(self.version),)
        understands: dict[str, Any] = {}
        if self.host is not None:
            parts, understands = self.host.parts, self.host.understands
        return LoadReport(
            self.version, self.nbytes, self.system, self.model.rank, evicted, parts, understands
        )


class Residency:
    """Host copies by id, up to `limit` bytes; the least recently used goes first.

    Nothing leaves on its own: only `put` evicts, and never what its caller names.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._held: OrderedDict[int, Resident] = OrderedDict()

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._held

    def get(self, adapter_id: int) -> Resident | None:
        """What is held under an id, which now is the last to go."""
        if adapter_id in self._held:
            self._held.move_to_end(adapter_id)
        return self._held.get(adapter_id)

    def find(self, version: str) -> tuple[int, Resident] | None:
        """What is held of a version, which now is the last to go, and its id."""
        found = next((i for i, held in self._held.items() if held.version == version), None)
        if found is None:
            return None
        self._held.move_to_end(found)
        return found, self._held[found]

    def all(self) -> dict[int, Resident]:
        """Everything held, by id."""
        return dict(self._held)

    def put(self, adapter_id: int, new: Resident, in_use: Collection[int]) -> tuple[int, ...]:
        """Holds an adapter, in place of what stood under its id.

        Args:
            in_use: ids that stay.
        Returns:
            Ids of the adapters that had to go.
        Raises:
            AdapterError: `host_cache_full`; everything is as it was.
        """
        old = self._held.get(adapter_id)
        total = self.nbytes + new.nbytes - (old.nbytes if old else 0)
        leaving = []
        for other, held in self._held.items():
            if total <= self.limit:
                break
            if other != adapter_id and other not in in_use:
                leaving.append(other)
                total -= held.nbytes
        if total > self.limit:
            raise AdapterError(
                "host_cache_full", "the adapter does not fit into the host memory for adapters"
                " beside those that are in use", seen=f"{_mib(new.nbytes)} MiB more, in all"
                f" {_mib(total)} MiB", limit=f"host_cache_mb {self.limit >> 20}",
                fix='start with a larger "host_cache_mb" in the settings of lora_ext, or unload'
                " adapters",
            )  # fmt: skip
        for other in (*leaving, adapter_id):
            self.drop(other)
        self._held[adapter_id] = new
        self.nbytes += new.nbytes
        return tuple(leaving)

    def drop(self, adapter_id: int) -> bool:
        """Forgets an adapter. False when it was not held."""
        held = self._held.pop(adapter_id, None)
        self.nbytes -= held.nbytes if held else 0
        return held is not None


def flat_views(
    groups: Sequence[Sequence[Shape]], pinned: bool
) -> tuple[int, list[list[torch.Tensor]]]:
    """Tensors that stand one after the other in flat memory.

    Page-locked memory comes in pieces: its allocator rounds a size up to a power of two, which one
    buffer would pay with up to as much again, and keeps what is given back for the same size only.

    Args:
        groups: shapes and dtypes; the answer has the same form.
    Returns:
        Bytes in all, and the tensors.
    """
    sizes = [_padded(*shape) for shapes in groups for shape in shapes]
    pieces = list(_pieces(sizes, _PIECE[pinned]))
    views = iter(
        part
        for count in pieces
        for part in torch.empty(sum(count), dtype=torch.uint8, pin_memory=pinned).split(count)
    )
    return sum(sizes), [[_view(next(views), *shape) for shape in shapes] for shapes in groups]


def _pieces(sizes: Sequence[int], piece: int) -> Iterator[list[int]]:
    """The sizes in runs of up to `piece` bytes; a larger one is a run of its own."""
    run: list[int] = []
    for size in sizes:
        if run and sum(run) + size > piece:
            yield run
            run = []
        run.append(size)
    if run:
        yield run


def pack_flat(kinds: Sequence[Layout], pinned: bool) -> tuple[int, list[dict[str, Any]]]:
    """All of an adapter in flat memory: its bytes, and what was made of each entry."""
    groups = [shapes for kind in kinds for shapes, _ in kind.values()]
    nbytes, views = flat_views(groups, pinned)
    left = iter(views)
    return nbytes, [{name: fill(next(left)) for name, (_, fill) in kind.items()} for kind in kinds]


def one(tensor: torch.Tensor) -> tuple[list[Shape], Fill]:
    """The entry of a tensor that is held as it is."""
    return [(tuple(tensor.shape), tensor.dtype)], lambda out: out[0].copy_(tensor)


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-_bytes(shape, dtype) // _ALIGN) * _ALIGN


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _view(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return memory[: _bytes(shape, dtype)].view(dtype).view(shape)


def _mib(nbytes: int) -> int:
    return -(-nbytes // (1 << 20))
