"""Weights that are fetched beside a product: which, when, and that nothing else is touched.

Compiled where there is a GPU; without one `test_triton` runs this file in Triton's interpreter,
where the kernel reads what it would ask for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.test_triton import DEVICE, ON_GPU, Batch, gated, on_gpu, runs_kernels, top_k
from tests.make_adapters import random_module
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    begin,
    finish_,
    prefetch,
    prefetch_in_order,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS
from vllm_lora_ext.kernels.gated_lora.optional_selfcheck import selfcheck
from vllm_lora_ext.routing import GateSpec

DTYPES = (torch.float32, torch.bfloat16)
interpreted = pytest.mark.skipif(ON_GPU, reason="asks the interpreter what was read")
SECTOR = 32


class Pair:
    """Two sites that run one after the other in one step; unused memory of both is NaN."""

    def __init__(self, seed, t, dtype, k=(24, 20), sizes=((13, 7, 7), (9, 4))):
        self.batches = [
            Batch(seed + i, t, own, width, dtype=dtype)
            for i, (own, width) in enumerate(zip(sizes, k, strict=True))
        ]
        self.first, self.after = self.sites = [batch.site for batch in self.batches]
        self.after.step = self.first.step
        prefetch_in_order(self.sites)
        self.map(self.batches[0].slots_T)

    def map(self, slots_T):
        for batch in self.batches:
            batch.map(slots_T)

    def fill(self, slot, *specs):
        """One spec, of all slices, for each site."""
        for batch, spec in zip(self.batches, specs, strict=True):
            batch.fill(slot, [random_module(batch.rng, batch.k, n, spec) for n in batch.sizes])

    def buffers(self):
        found = [t for s in self.sites for t in (s.a_SRK, s.store.b_SRN, s.router_SGK)]
        tables = [t for s in self.sites for t in (s.store.tables.ints_SI, s.store.tables.floats_SF)]
        return [*found, *tables, self.first.step.table]

    def factors(self, slots, whole=()):
        """[first, last) address of what is to be asked for: A and routers of the second site, and
        B of the first in the slots whose gates leave none of it unread."""
        b_SRN, found = self.first.store.b_SRN, []
        for slot in slots:
            plan, own = self.after.plans[slot], self.first.plans[slot]
            found += [_span(t) for t in (plan.a_RK, plan.router_GK) if len(t)]
            if slot in whole:
                found.append(_span(b_SRN[slot, : max(len(p.bt_RN) for p in own.slices)]))
        return found


def _span(tensor):
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.fixture
def asked(monkeypatch):
    """Addresses of floats that the interpreter reads, in order."""
    from triton.runtime import interpreter

    found, plain = [], interpreter._interpreter.load

    class Spy:
        def __getattr__(self, name):
            return getattr(spied, name)

        def load(self, ptrs, mask, other, dtype):
            if np.size(ptrs) > 1:  # tables are read one number at a time
                found.extend(np.asarray(ptrs)[np.asarray(mask)].tolist())
            return plain(ptrs, mask, other, dtype)

    spied = interpreter._interpreter
    monkeypatch.setattr(interpreter, "_interpreter", Spy())
    return found


def _bits(tensor):
    return tensor.cpu().contiguous().view(torch.uint8).clone()


SPECS = (GateSpec(), top_k(4, 3, 2), gated(3, 5, score="softmax"), top_k(3, 2, 3))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_every_buffer_is_as_it_was_and_so_is_the_result(seed, dtype):
    pair = Pair(seed, (1, 9, 33, 64)[seed], dtype)
    for slot, spec in enumerate(SPECS):
        pair.fill(slot, spec, SPECS[(slot + seed) % 4])
    pair.map(np.arange(len(pair.batches[0].x_TK)) % 5 - (seed > 0))
    before, want = [_bits(t) for t in pair.buffers()], [b.run() for b in pair.batches]
    for site in pair.sites:
        prefetch(pair.batches[0].x_TK, site)
    assert all(torch.equal(_bits(t), old) for t, old in zip(pair.buffers(), before, strict=True))
    for batch, want_TN in zip(pair.batches, want, strict=True):
        y_TN = torch.zeros_like(want_TN, device=DEVICE)
        u_PTR = begin(batch.x_TK, batch.site)
        prefetch(batch.x_TK, batch.site)
        finish_(y_TN, batch.x_TK, u_PTR, batch.site)
        assert torch.equal(y_TN.cpu(), want_TN) and torch.isfinite(want_TN).all()


@runs_kernels
@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_all_of_the_steps_factors_is_asked_for_and_nothing_else(seed, dtype, asked):
    """At sizes that no sector divides, and slices of one column."""
    rng = np.random.default_rng(seed)
    k = tuple(rng.integers(1, 90, 2).tolist())
    sizes = tuple(tuple(rng.integers(1, 60, n).tolist()) for n in (1 + seed % 3, 2))
    pair = Pair(seed, 20, dtype, k, sizes)
    for slot, spec in enumerate(SPECS):
        pair.fill(slot, spec, SPECS[(slot + 1) % 4])
    slots = [slot for slot in range(4) if slot != seed % 4]
    pair.map(np.resize([*slots, -1], 20))
    prefetch(pair.batches[0].x_TK, pair.first)
    spans = pair.factors(slots, whole=(0, 2, 3))  # slot 1 chooses: what, nobody knows yet
    want = [at for first, last in spans for at in range(first, last, SECTOR)]
    assert sorted(asked) == sorted(want)


@runs_kernels
@interpreted
def test_large_factors_take_several_programs(asked):
    pair = Pair(1, 3, torch.float32, k=(16, 4096), sizes=((900, 800), (16,)))
    pair.fill(2, gated(2, 20, score="softmax"), top_k(16, 1, 2))
    pair.map([2, -1, 2])
    prefetch(pair.batches[0].x_TK, pair.first)
    spans = pair.factors([2], whole=[2])
    assert all(last - first > 1024 * SECTOR for first, last in spans)
    assert sorted(asked) == sorted(at for span in spans for at in range(*span, SECTOR))


@runs_kernels
@interpreted
def test_a_slot_of_many_rows_is_asked_for_once(asked):
    pair = Pair(2, MOST_ROWS, torch.bfloat16)
    pair.fill(1, GateSpec(), GateSpec())
    pair.map([1] * MOST_ROWS)
    prefetch(pair.batches[0].x_TK, pair.first)
    assert len(asked) == len(set(asked)) > 0


@runs_kernels
@interpreted
def test_the_last_site_asks_for_its_own_only(asked):
    pair = Pair(3, 4, torch.float32)
    pair.fill(0, top_k(4, 3, 2), GateSpec())
    pair.map([0, 0, -1, 0])
    prefetch(pair.batches[0].x_TK, pair.after)
    b_SRN, own = pair.after.store.b_SRN, pair.after.plans[0]
    first, last = _span(b_SRN[0, : max(len(p.bt_RN) for p in own.slices)])
    assert sorted(asked) == list(range(first, last, SECTOR))


@runs_kernels
@interpreted
def test_slots_that_are_empty_in_one_of_the_sites(asked):
    pair = Pair(4, 4, torch.float32)
    batch = pair.batches[0]
    batch.fill(0, [random_module(batch.rng, batch.k, n, GateSpec()) for n in batch.sizes])
    pair.map([0, 1, 2, 3])
    prefetch(batch.x_TK, pair.first)
    b_SRN, own = pair.first.store.b_SRN, pair.first.plans[0]
    first, last = _span(b_SRN[0, : max(len(p.bt_RN) for p in own.slices)])
    assert sorted(asked) == list(range(first, last, SECTOR))


@runs_kernels
@interpreted
def test_an_adapter_that_left_is_asked_for_no_more(asked):
    pair = Pair(5, 4, torch.float32)
    pair.fill(0, GateSpec(), top_k(4, 3, 2))
    for site in pair.sites:
        site.clear(0)
    pair.map([0] * 4)
    prefetch(pair.batches[0].x_TK, pair.first)
    assert not asked


@pytest.mark.parametrize(
    ("slots_T", "rows"), [([-1] * 4, 4), ([0] * 4, 0), ([0] * 80, MOST_ROWS + 1)]
)
def test_a_step_without_adapters_or_rows_and_a_large_one_launch_nothing(slots_T, rows, monkeypatch):
    from vllm_lora_ext.kernels.gated_lora.backends.triton import prefetch as module

    monkeypatch.setattr(module, "prefetch_kernel", None)  # a launch of it would raise
    site = Site(2, 16, (8,), 8, 8, torch.float32, "cpu", choice.triton())
    site.step = StepMap(80, tiled=True)
    prefetch_in_order([site])
    site.step.update(np.asarray(slots_T))
    prefetch(torch.empty(rows, 16), site)
    site.step.update(np.zeros(4, dtype=np.int64))
    with pytest.raises(TypeError):
        prefetch(torch.empty(4, 16), site)


def test_sites_know_who_follows_them_in_one_step():
    def site(step, base_NK=None):
        made = Site(2, 16, (8,), 8, 8, torch.float32, "cpu", choice.triton(), base_NK=base_NK)
        made.step = step
        return made

    text, tower = StepMap(4, tiled=True), StepMap(4, tiled=True)
    sites = [site(tower), site(text), site(text), site(text, torch.zeros(8, 16)), site(text)]
    prefetch_in_order(sites)
    assert all(one.prefetches for one in sites)
    assert [one.following for one in sites] == [None, sites[2], None, sites[4], None]
    prefetch_in_order([])


@pytest.mark.parametrize(
    ("specs", "whole"),
    [
        ((GateSpec(), None), True), ((gated(4, 2), GateSpec()), True),
        ((top_k(4, 2, 4), GateSpec()), True), ((top_k(4, 2, 2), GateSpec()), False),
        ((GateSpec(), gated(4, 2, score="softmax", select="threshold", threshold=0.1)), False),
        ((GateSpec(), gated(4, 2, score="softmax", mask_below=0.1)), False), ((None, None), False),
    ],
)  # fmt: skip
def test_b_is_asked_for_where_no_gate_leaves_some_of_it_unread(specs, whole):
    from vllm_lora_ext.kernels.gated_lora.backends.triton.tables import COUNTS

    rng = np.random.default_rng(0)
    site = Site(2, 16, (8, 8), 16, 8, torch.float32, "cpu", choice.triton())
    modules = [s and random_module(rng, 16, 8, s) for s in specs]
    site.write(1, modules)
    ranks = max((m.b_NR.shape[1] for m in modules if m), default=0)
    b_rows = int(site.store.tables.ints_SI[1, COUNTS.index("b_rows")])
    assert b_rows == (ranks if whole else 0)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_at_start_passes_and_says_what_fails(dtype, monkeypatch):
    from vllm_lora_ext.kernels.gated_lora.backends.triton import prefetch as module

    case = DEVICE, dtype, 16, 8, False, False
    assert selfcheck(*case, True) is None
    monkeypatch.setattr(module, "prefetch_kernel", None)
    assert selfcheck(*case, False) is None
    assert "TypeError" in selfcheck(*case, True)


@on_gpu
def test_a_captured_graph_fetches_on_a_second_stream():
    """And follows the step: adapters and slots that the capture did not know."""
    pair = Pair(6, 24, torch.bfloat16, k=(64, 64), sizes=((64,), (48, 16)))
    for slot, spec in enumerate(SPECS):
        pair.fill(slot, spec, spec)
    pair.map([0] * 24)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    weights = [torch.randn(sum(b.sizes), 64, device=DEVICE).bfloat16() for b in pair.batches]

    def layers(fetches):
        here, found = torch.cuda.current_stream(), []
        for batch, weight_NK in zip(pair.batches, weights, strict=True):
            side.wait_stream(here)
            y_TN = batch.x_TK @ weight_NK.t()
            with torch.cuda.stream(side):
                u_PTR = begin(batch.x_TK, batch.site)
                if fetches:
                    prefetch(batch.x_TK, batch.site)
            here.wait_stream(side)
            finish_(y_TN, batch.x_TK, u_PTR, batch.site)
            found.append(y_TN)
        return found

    layers(True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = layers(True)
    pair.map(np.arange(24) % 5 - 1)
    pair.fill(1, top_k(2, 4, 1), GateSpec())
    graph.replay()
    for got_TN, want_TN in zip(got, layers(False), strict=True):
        assert torch.equal(got_TN, want_TN)
