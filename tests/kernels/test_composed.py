"""Slots with several adapters, and numbers that come with rows: every backend and the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.compiled import need_compiled
from tests.make_adapters import normal, random_module, random_spec, router_spec
from tests.slot_parts import put, random_parts, random_rows
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

SLOTS, MAX_RANK, NAN = 4, 40, float("nan")
SPAN = GateSpec(source="position", blocks=(4,))


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu_native, "tables", lambda *_: None)
    else:
        need_compiled()
    return request.param


class Layer:
    """A site whose unused memory is NaN, slot 2 empty."""

    def __init__(self, seed: int, sizes=(13, 7, 7), k=24) -> None:
        self.rng = np.random.default_rng(seed)
        self.sizes, self.k = sizes, k
        self.site = Site(SLOTS, k, sizes, MAX_RANK, MAX_RANK, torch.float32, "cpu")
        self.site.reserve_routers(self.site.most_routers)
        for buffer in (self.site.a_SRK, self.site.router_SGK, *self.site.bt_SRN):
            buffer.fill_(NAN)
        self.site.step = self.step = StepMap(64)
        self.step.rows_TC.fill_(NAN)
        self.handle = register_site(self.site)
        self.slots: list[list] = [[None] * len(sizes)] * SLOTS

    def put(self, slot: int, parts: list[SlotPart]) -> None:
        put(self.site, slot, parts)
        self.slots[slot] = parts

    def fill(self) -> None:
        for slot in (0, 1, 3):
            self.put(slot, random_parts(self.rng, self.k, self.sizes, MAX_RANK))

    def map(self, slots_T, rows_TC=None):
        """Only rows that have a use for numbers get some."""
        self.slots_T = np.asarray(slots_T)
        self.step.update(self.slots_T)
        self.rows_TC = (
            random_rows(self.rng, len(slots_T), MAX_COLUMNS) if rows_TC is None else rows_TC
        )
        needs = [s for s, plan in enumerate(self.site.plans) if plan is not None and plan.columns]
        at = np.flatnonzero(np.isin(self.slots_T, needs))
        self.step.set_rows(self.rows_TC[at], [slice(i, i + 1) for i in at])
        self.x_TK = normal(self.rng, len(slots_T), self.k)

    def error(self, y_TN: torch.Tensor) -> float:
        want_TN = gated_lora_reference(
            self.x_TK, torch.tensor(self.slots_T), self.slots, self.sizes,
            torch.from_numpy(self.rows_TC),
        )  # fmt: skip
        assert torch.isfinite(y_TN).all()
        assert not y_TN[(self.slots_T < 0) | (self.slots_T == 2)].any()
        return ((y_TN - want_TN).norm() / want_TN.norm().clamp_min(1e-9)).item()

    def run(self) -> torch.Tensor:
        y_TN = torch.zeros(len(self.slots_T), sum(self.sizes))
        gated_lora_(y_TN, self.x_TK, self.handle)
        return y_TN


@pytest.mark.parametrize("seed", range(30))
def test_any_parts_in_any_slot(path, seed):
    rng = np.random.default_rng(seed)
    k, sizes = int(rng.integers(1, 70)), tuple(rng.integers(1, 90, rng.integers(1, 4)).tolist())
    layer = Layer(seed, sizes, k)
    layer.fill()
    for t in (1, 2, 7, 33):
        layer.map([0, *rng.integers(-1, SLOTS, t - 1)])
        for _ in range(2):  # through Python, then without it
            assert layer.error(layer.run()) < 3e-5
        backend, y_TN = layer.site.backend, torch.zeros(t, sum(sizes))
        backend.expand_(y_TN, backend.shrink(layer.x_TK, layer.site), layer.site)
        assert layer.error(y_TN) < 3e-5


def test_calls_with_numbers_of_rows_stay_in_cpp(monkeypatch):
    """New numbers and new adapters are followed without a call into Python."""
    need_compiled()
    layer = Layer(0)
    layer.put(0, [SlotPart([random_module(layer.rng, 24, n, SPAN) for n in layer.sizes])])
    layer.map([0, 0, -1])
    layer.run()
    monkeypatch.setattr(layer.site.backend, "gated_lora_", None)
    for _ in range(3):
        layer.map([0, -1, 0, 0])
        assert layer.error(layer.run()) < 2e-5


def test_plain_adapters_become_one_plain_adapter(path):
    layer = Layer(1)
    parts = [
        SlotPart([random_module(layer.rng, 24, n, GateSpec(), rank) for n in layer.sizes], scale)
        for rank, scale in ((3, 1.0), (5, -0.5), (8, 0.0), (2, 3.0))
    ]
    layer.put(0, parts)
    plan = layer.site.plans[0]
    assert plan.plain and not plan.columns
    assert [(p.gate, len(p.bt_RN)) for p in plan.slices] == [(GateSpec(), 10)] * 3
    assert "rows_TC" not in vars(StepMap(8))
    layer.map([0, -1, 0])
    assert layer.error(layer.run()) < 2e-5


def test_routed_adapters_of_one_gate_are_gated_at_once():
    layer = Layer(2)
    parts = [
        SlotPart([random_module(layer.rng, 24, n, router_spec()) for n in layer.sizes], scale)
        for scale in (1.0, 2.0)
    ]
    layer.put(0, parts)
    assert layer.site.plans[0].shared == router_spec()
    layer.map([0, 0])
    assert layer.error(layer.run()) < 2e-5


def test_a_factor_of_zero_adds_nothing_and_hides_what_is_behind_it(path):
    layer = Layer(3, sizes=(16,))
    bad = random_module(layer.rng, 24, 16, GateSpec(), 4)
    parts = [SlotPart([random_module(layer.rng, 24, 16, GateSpec(), 4)], 1.0, 0)]
    layer.put(0, [*parts, SlotPart([bad], 1.0, 1)])
    layer.map([0, 0, 0], np.array([[0, 0], [1, 0], [0.5, 2]], np.float32))
    y_TN = layer.run()
    assert layer.error(y_TN) < 2e-5
    assert not y_TN[0].any()


@pytest.mark.parametrize("select", ["all", "top_k"])
def test_experts_that_no_row_opens_are_not_read(select):
    """Theirs is NaN; one expert has all rows, one some, one none."""
    need_compiled()
    layer = Layer(8, sizes=(16,))
    more = {"k": 2, "weight": "one"} if select == "top_k" else {}
    gate = GateSpec(source="request", blocks=(4, 4, 4), select=select, **more)
    module = random_module(layer.rng, 24, 16, gate)
    layer.put(0, [SlotPart([module])])
    layer.map([0, -1, 0, 0], np.array([[2, 1, 0], [0, 0, 0], [1, 0.5, 0], [1, 2, 0]], np.float32))
    assert layer.error(layer.run()) < 2e-5
    want_TN = layer.run()
    a_RK, b_NR = module.a_RK.clone(), module.b_NR.clone()
    a_RK[8:], b_NR[:, 8:] = NAN, NAN
    put(layer.site, 0, [SlotPart([replace(module, a_RK=a_RK, b_NR=b_NR)])])
    torch.testing.assert_close(layer.run(), want_TN)


def test_what_does_not_fit_is_refused_with_both_numbers():
    layer = Layer(4, sizes=(16, 8))
    one = layer.site.pack([random_module(layer.rng, 24, n, GateSpec(), 30) for n in (16, 8)])
    with pytest.raises(ValueError, match=r"slice 0: ranks 30 \+ 30 = 60 of 40"):
        layer.site.compose([(one, 1.0, -1, 0), (one, 1.0, -1, 0)])
    assert layer.site.compose([(one, 1.0, -1, 0), (one, 0.0, -1, 0)]) is not None
    routed = layer.site.pack([random_module(layer.rng, 24, 16, router_spec(12, 3)), None])
    layer.site.most_routers = 20
    with pytest.raises(ValueError, match="router rows 24 of 20"):
        (i, plan), rest = routed.slices[0], routed.slices[1:]
        small = (i, replace(plan, bt_RN=plan.bt_RN[:18])), *rest
        layer.site.compose([(replace(routed, slices=small), 1.0, -1, 0)] * 2)
    span = layer.site.pack([random_module(layer.rng, 24, 16, SPAN), None])
    with pytest.raises(ValueError, match="65 of 64"):
        layer.site.compose([(span, 1.0, -1, MAX_COLUMNS)])
    wide = GateSpec(source="request", blocks=(1,) * (MAX_COLUMNS + 1))
    big = Site(1, 24, (16,), 80, 80, torch.float32, "cpu")
    with pytest.raises(ValueError, match="65"):
        big.pack([random_module(layer.rng, 24, 16, wide)])


def test_nothing_composed_is_nothing():
    layer = Layer(5)
    assert layer.site.compose([]) is None
    assert layer.site.compose([(None, 1.0, -1, 0), (None, 2.0, 3, 4)]) is None
    assert layer.site.composed_shapes([(None, 1.0, -1, 0)]) == []


def test_composed_into_given_memory():
    layer = Layer(6)
    parts = random_parts(layer.rng, layer.k, layer.sizes, MAX_RANK)
    packed = [(layer.site.pack(p.slices), p.scale, p.factor_at, p.row_start) for p in parts]
    shapes = layer.site.composed_shapes(packed)
    out = [torch.full(shape, NAN, dtype=dtype) for shape, dtype in shapes]
    made = layer.site.compose(packed, out)
    assert all(a is b for a, b in zip(out, (made.a_RK, made.router_GK, *made.stored), strict=True))
    assert not any(t.isnan().any() for t in out)


def test_rows_are_set_by_spans_of_the_step():
    step = StepMap(8)
    step.rows_TC.fill_(9)
    step.set_rows(np.arange(6, dtype=np.float32).reshape(3, 2), [slice(1, 3), slice(5, 6)])
    assert step.rows_TC.shape == (8, MAX_COLUMNS)
    assert step.rows_TC[:, :2].tolist() == [
        [9, 9], [0, 1], [2, 3], [9, 9], [9, 9], [4, 5], [9, 9], [9, 9]
    ]  # fmt: skip
    assert (step.rows_TC[:, 2:] == 9).all()
    step.set_rows(np.zeros((0, 2), np.float32), [])
    where = step.rows_TC.data_ptr()
    step.update(np.array([0, 1]))
    assert step.rows_TC.data_ptr() == where


def test_an_adapter_alone_reads_its_own_columns_from_the_first_one_on(path):
    layer = Layer(7, sizes=(16,))
    gate = GateSpec(source="request", blocks=(3, 2, 4), select="top_k", k=2, weight="renormalise",
                    score="softmax")  # fmt: skip
    module = random_module(layer.rng, 24, 16, gate)
    layer.site.write(1, [module])
    layer.slots[1] = [module]
    assert layer.site.plans[1].columns == 3
    layer.map([1, -1, 1])
    assert layer.error(layer.run()) < 2e-5


@pytest.mark.parametrize("seed", range(12))
def test_one_adapter_of_the_whole_table(path, seed):
    layer = Layer(seed, sizes=(20,), k=33)
    spec = random_spec(layer.rng, MAX_RANK, ("router", "prototype"), wide=True)
    spec = replace(spec, normalise="layer")
    layer.put(0, [SlotPart([random_module(layer.rng, 33, 20, spec)])])
    layer.map([0] * 9)
    layer.x_TK = layer.x_TK * 3 + 2  # a mean that is not near zero
    assert layer.error(layer.run()) < 1e-4
