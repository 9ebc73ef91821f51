"""x is a shard: what is summed over the ranks, and that all of them then add up to the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.make_adapters import normal, random_module, random_spec
from tests.ranks import Ranks
from tests.slot_parts import ALL_SOURCES, put, random_parts, random_rows
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gated_lora_,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native
from vllm_lora_ext.kernels.gated_lora.reference import SlotPart
from vllm_lora_ext.kernels.gated_lora.step import MAX_COLUMNS
from vllm_lora_ext.routing import GateSpec

K, N, RANK, ROWS, T = 24, 14, 40, 40, 9
PLAIN = GateSpec()
ROUTER = GateSpec(
    source="router", blocks=(3, 4, 5), score="softmax", select="top_k", k=2, weight="renormalise"
)
HEAD = GateSpec(
    source="router", blocks=(3, 4), score="sigmoid", select="threshold", threshold=0.5,
    threshold_head=True,
)  # fmt: skip
GIVEN = GateSpec(source="position", blocks=(3, 4))
SELF = GateSpec(source="self", blocks=(1,) * 6, select="top_k", key="abs", k=2, weight="one")


class Sharded:
    """One row-parallel layer on two ranks."""

    def __init__(self, seed: int, static: bool = False, rows: int = ROWS) -> None:
        self.rng, self.ranks, self.step = np.random.default_rng(seed), Ranks(), StepMap(16)
        self.slots: list[list] = [[None]] * 4
        self.sites = [
            Site(
                4, K // 2, (N,), RANK, rows, torch.float32, "cpu",
                reduce=self.ranks.sum_, static=static,
            )
            for _ in range(2)
        ]  # fmt: skip
        for site in self.sites:
            site.step = self.step
        self.handles = [register_site(site) for site in self.sites]
        self.read: list[list] = [[], []]
        for rank, site in enumerate(self.sites):
            site.listen(lambda _y, _x, u, rank=rank: self.read[rank].append(u))

    def write(self, slot: int, spec: GateSpec) -> None:
        self.put(slot, [SlotPart([random_module(self.rng, K, N, spec)])])

    def put(self, slot: int, parts: list[SlotPart]) -> None:
        self.slots[slot] = parts
        for rank, site in enumerate(self.sites):
            put(site, slot, [replace(p, slices=[m and self.cut(m, rank) for m in p.slices])
                             for p in parts])  # fmt: skip

    def cut(self, m: Any, rank: int) -> Any:
        return _cut(m, slice(rank * K // 2, (rank + 1) * K // 2))

    def check(self, slots: list[int], frozen: bool | None = None) -> list[tuple[int, ...]]:
        """The ranks' sum against the reference; returns what was summed on the way."""
        slots_T, x_TK = np.array(slots), normal(self.rng, len(slots), K)
        self.step.update(slots_T)
        self.step.frozen = frozen
        rows_TC = random_rows(self.rng, len(slots), MAX_COLUMNS)
        self.step.set_rows(rows_TC, [slice(0, len(slots))])
        before = len(self.ranks.summed)
        got = self.add(x_TK)
        want = gated_lora_reference(
            x_TK, torch.tensor(slots_T), self.slots, (N,), torch.from_numpy(rows_TC)
        )
        assert (got - want).norm() <= 2e-5 * want.norm()
        self._check_equal(slots_T, *(read.pop() for read in self.read if read))
        return self.ranks.summed[before:]

    def add(self, x_TK: torch.Tensor) -> torch.Tensor:
        """What the layer adds to zeros."""
        shards = [x.contiguous() for x in x_TK.chunk(2, dim=1)]

        def one(rank: int) -> torch.Tensor:
            y_TN = torch.zeros(len(x_TK), N)
            gated_lora_(y_TN, shards[rank], self.handles[rank])
            return y_TN

        return sum(self.ranks.run(one))

    def _check_equal(self, slots_T: np.ndarray, *read: torch.Tensor | None) -> None:
        """Bit for bit what the gates of either rank have read."""
        plans = self.sites[0].plans
        assert len({u is None for u in read}) <= 1
        if any(u is None for u in read):
            assert all(s < 0 or plans[s] is None or not plans[s].num_inputs for s in slots_T)
        for slot, plan in enumerate(plans if read and read[0] is not None else ()):
            for columns in plan.inputs if plan is not None else ():
                mine, other = (u[slots_T == slot][:, columns] for u in read)
                assert torch.equal(mine, other)


def _cut(m, k: slice):
    return replace(
        m, a_RK=m.a_RK[:, k], router_GK=None if m.router_GK is None else m.router_GK[:, k],
        head_K=None if m.head_K is None else m.head_K[k],
    )  # fmt: skip


@pytest.fixture(params=["compiled", "pytorch"])
def path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(cpu_native, "tables", lambda *_: None)


@pytest.mark.usefixtures("path")
def test_only_what_gates_read_is_summed():
    layer = Sharded(0)
    for slot, spec in enumerate((PLAIN, ROUTER, HEAD, SELF)):
        layer.write(slot, spec)
    assert layer.check([-1] * T) == []
    assert layer.check([0, -1, 0]) == []
    assert layer.check([1, 0, -1, 1]) == [(4, 3)]
    assert layer.check([2]) == [(1, 3)]  # two gates and the head
    assert layer.check([3, 3]) == [(2, 6)]
    assert layer.check([3, 1, 2, 0, -1]) == [(5, 6)]
    assert layer.check([-1] * T) == []
    layer.write(0, GIVEN)
    layer.write(1, replace(ROUTER, normalise="layer"))
    assert layer.check([0, -1, 0]) == []
    assert layer.check([0, 1]) == [(2, 5)]  # three logits, and two numbers of x
    layer.put(0, [SlotPart([random_module(layer.rng, K, N, PLAIN)], 1.0, 3)])
    assert layer.check([0, -1, 0]) == []


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("seed", range(12))
def test_the_ranks_add_up_and_read_the_same_bits(seed):
    layer = Sharded(seed)
    for slot in range(3):
        layer.write(slot, random_spec(layer.rng, RANK, ALL_SOURCES, wide=True))
    for _ in range(3):
        layer.check(list(layer.rng.integers(-1, 4, T)))
    layer.put(1, random_parts(layer.rng, K, (N,), RANK))
    layer.check([1, -1, 1, 0, 2])


def test_in_captured_graphs_it_does_not_depend_on_the_slots():
    layer = Sharded(1, static=True)
    for slot, spec in enumerate((PLAIN, ROUTER, HEAD, SELF)):
        layer.write(slot, spec)
    rows = layer.sites[0].num_rows
    for slots in ([0, -1, 0], [1, 0, 2], [3, 3, -1]):
        assert layer.check(slots, frozen=True) == [(3, rows)]
    assert layer.check([-1] * T, frozen=True) == []


def test_a_captured_graph_for_gates_that_read_no_x_sums_nothing():
    """And steps that no graph serves sum what their own gates read."""
    layer = Sharded(1, static=True)
    for slot, spec in enumerate((PLAIN, ROUTER, GIVEN)):
        layer.write(slot, spec)
    for slots in ([0, -1, 0], [2, 0, 2], [-1, -1, -1]):
        assert layer.check(slots, frozen=False) == []
    assert layer.check([0, 1, 2]) == [(3, 3)]
    assert layer.check([0, 2, 0]) == []


def test_an_engine_with_graphs_and_without_router_rows_sums_nothing_and_takes_no_gate():
    layer = Sharded(1, static=True, rows=0)
    layer.write(0, PLAIN)
    for frozen in (None, False, True):
        assert layer.check([0, -1, 0], frozen) == []
    with pytest.raises(ValueError, match="gate"):
        layer.write(1, SELF)
    layer.write(1, GIVEN)
    assert layer.check([1, 0, 1]) == []


class FullySharded(Sharded):
    """A layer on two ranks that have half of A and half of B each: `x` is whole, and y a part of
    the layer's, as in a column-parallel layer; or x is a part, and y a partial sum."""

    def __init__(self, seed: int, x_is_whole: bool, **options: Any) -> None:
        super().__init__(seed)
        self.x_is_whole = x_is_whole
        for rank in range(2):
            k, n = (slice(rank * size // 2, (rank + 1) * size // 2) for size in (K, N))
            part: dict[str, Any] = {"x_part": k} if x_is_whole else {"y_part": n}
            site = Site(
                4, K // 2, (N // 2,), RANK, ROWS, torch.float32, "cpu",
                reduce=self.ranks.sum_, **part, **options,
            )  # fmt: skip
            site.step = self.step
            site.listen(lambda _y, _x, u, rank=rank: self.read[rank].append(u))
            self.sites[rank], self.handles[rank] = site, register_site(site)

    def cut(self, m: Any, rank: int) -> Any:
        half = slice(rank * N // 2, (rank + 1) * N // 2)
        return replace(super().cut(m, rank), b_NR=m.b_NR[half])

    def add(self, x_TK: torch.Tensor) -> torch.Tensor:
        def one(rank: int) -> torch.Tensor:
            y_TN = torch.zeros(len(x_TK), N // 2 if self.x_is_whole else N)
            x = x_TK if self.x_is_whole else x_TK.chunk(2, dim=1)[rank].contiguous()
            gated_lora_(y_TN, x, self.handles[rank])
            return y_TN

        parts = self.ranks.run(one)
        return torch.cat(parts, dim=1) if self.x_is_whole else sum(parts)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("x_is_whole", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_half_of_a_and_b_on_each_rank(x_is_whole: bool, seed: int):
    layer = FullySharded(seed, x_is_whole)
    assert [site.a_SRK.shape[2] for site in layer.sites] == [K // 2] * 2
    layer.write(0, PLAIN)
    assert layer.check([-1, -1]) == []
    assert layer.check([0, -1]) == [(2, layer.sites[0].plans[0].num_rows)]
    for slot in range(1, 4):
        layer.write(slot, random_spec(layer.rng, RANK, ALL_SOURCES, wide=True))
    for _ in range(3):
        layer.check(list(layer.rng.integers(-1, 4, T)))
    layer.put(1, random_parts(layer.rng, K, (N,), RANK))
    layer.check([1, -1, 1, 0, 2])
