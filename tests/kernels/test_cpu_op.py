"""The op in C++: the same numbers as through Python, and nothing old after a change."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests.compiled import need_compiled
from tests.make_adapters import normal, random_module, random_spec
from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gated_lora_,
    gated_lora_reference,
    op,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends.native import op as cpu_op
from vllm_lora_ext.kernels.mix_mlp import BlockSite, mix_act_, register_block
from vllm_lora_ext.routing import GateSpec

K, SIZES, SLOTS = 37, (21, 30), 3


@pytest.fixture(autouse=True)
def _compiled():
    need_compiled()


class Calls:
    """Calls of the op that came to Python."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        begin = op.begin

        def counted(*args):
            self.count += 1
            return begin(*args)

        monkeypatch.setattr(op, "begin", counted)

    def during(self, call) -> int:
        before = self.count
        call()
        return self.count - before


@pytest.fixture
def python(monkeypatch) -> Calls:
    return Calls(monkeypatch)


class Layer:
    """One site with random adapters in slots 0 and 2, its number, and the reference."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.site = Site(SLOTS, K, SIZES, 40, 40, torch.float32, "cpu")
        self.slots = [[None] * len(SIZES) for _ in range(SLOTS)]
        for slot in (0, 2):
            self.write(slot)
        self.site.step = StepMap(64)
        self.number = register_site(self.site)

    def write(self, slot: int) -> None:
        self.slots[slot] = [
            random_module(self.rng, K, n, random_spec(self.rng))
            if self.rng.random() < 0.9 else None
            for n in SIZES
        ]  # fmt: skip
        self.site.write(slot, self.slots[slot])

    def check(self, slots_T: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
        """The op on random rows against the reference."""
        x_TK, y_TN = (normal(self.rng, len(slots_T), n).to(dtype) for n in (K, sum(SIZES)))
        self.site.step.update(slots_T)
        want = y_TN.float() + gated_lora_reference(x_TK, torch.tensor(slots_T), self.slots, SIZES)
        base = y_TN.clone()
        gated_lora_(y_TN, x_TK, self.number)
        bound = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert torch.isfinite(y_TN).all()
        assert (y_TN.float() - want).norm() < bound * want.norm()
        assert torch.equal(y_TN[slots_T < 0], base[slots_T < 0])

    def rows(self, count: int) -> np.ndarray:
        slots_T = self.rng.integers(-1, SLOTS, count)
        slots_T[0] = 0
        return slots_T


def random_rows(layer: Layer) -> np.ndarray:
    return layer.rows(int(layer.rng.integers(1, 60)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_numbers(python, seed, dtype):
    layer = Layer(seed)
    for _ in range(4):
        layer.check(random_rows(layer), dtype)
    if dtype is not torch.float16:  # which not every processor converts
        assert python.during(lambda: layer.check(random_rows(layer), dtype)) == 0


def test_a_step_without_an_adapter_stays_in_c(python):
    layer = Layer(1)
    none = np.full(5, -1)
    layer.check(none)
    assert python.during(lambda: layer.check(none)) == 0
    layer.check(layer.rows(5))  # the door knew of no slots
    layer.check(none)
    assert python.during(lambda: layer.check(layer.rows(9))) == 0


def test_what_changes_is_seen(python):
    layer = Layer(2)
    layer.check(layer.rows(9))
    for _ in range(3):
        layer.write(2)
        layer.check(np.array([2, 2, 0, -1]))
    layer.site.clear(0)
    layer.slots[0] = [None, None]
    layer.check(np.array([2, 0, 0, -1]))
    layer.site.step = StepMap(16)
    layer.check(np.array([0, 2]))
    layer.site.step = StepMap(16)
    layer.check(np.full(3, -1))
    assert python.during(lambda: layer.check(np.array([2, 2]))) == 1


def test_hooks_hear_of_every_step_with_an_adapter():
    layer, heard = Layer(3), []
    layer.check(layer.rows(4))

    def hear(_y, x_TK, _u):
        heard.append(len(x_TK))

    layer.site.listen(hear)
    for count in (4, 7, 1):
        layer.check(layer.rows(count))
    layer.check(np.full(6, -1))
    assert heard == [4, 7, 1]
    layer.site.forget(hear)
    layer.check(layer.rows(4))
    assert heard == [4, 7, 1]


def test_tensors_that_the_kernels_do_not_take(python):
    """float64, and columns that do not lie together, go to Python and come out right."""
    layer = Layer(4)
    layer.check(layer.rows(9))
    slots_T = layer.rows(6)
    layer.site.step.update(slots_T)
    x_TK = normal(layer.rng, 6, K)
    want = gated_lora_reference(x_TK, torch.tensor(slots_T), layer.slots, SIZES)
    turned, wide = torch.zeros(sum(SIZES), 6).t(), torch.zeros(6, 70)
    gated_lora_(turned, x_TK, layer.number)
    gated_lora_(wide[:, 5 : 5 + sum(SIZES)], x_TK, layer.number)
    doubled = torch.zeros(6, sum(SIZES), dtype=torch.float64)
    gated_lora_(doubled, x_TK.double(), layer.number)
    for y_TN in (turned, wide[:, 5 : 5 + sum(SIZES)], doubled):
        assert (y_TN - want).norm() < 2e-5 * want.norm()
    assert not wide[:, :5].any()
    assert not wide[:, 5 + sum(SIZES) :].any()


def test_sites_do_not_mix_and_a_dead_one_is_shut():
    layers = [Layer(seed) for seed in range(5, 9)]
    for _ in range(3):
        for layer in layers:
            layer.check(random_rows(layer))
    number = layers.pop().number
    del layer
    gc.collect()
    with pytest.raises(RuntimeError):
        gated_lora_(torch.zeros(1, sum(SIZES)), torch.zeros(1, K), number)
    for layer in layers:
        layer.check(random_rows(layer))


def test_an_error_in_python_is_an_error(monkeypatch):
    layer = Layer(9)
    layer.site.step.update(layer.rows(3))

    def fail(*_):
        raise ValueError("told so")

    monkeypatch.setattr(layer.site.backend, "gated_lora_", fail)
    with pytest.raises((RuntimeError, ValueError)):
        gated_lora_(torch.zeros(3, sum(SIZES)), torch.zeros(3, K), layer.number)


def test_tensors_are_given_back():
    """Each call owns its handles: none may be left, none be freed twice."""
    layer = Layer(10)
    layer.check(layer.rows(3))
    x_TK, y_TN = torch.zeros(3, K), torch.zeros(3, sum(SIZES))
    for step in (layer.rows(3), np.full(3, -1)):
        layer.site.step.update(step)
        for _ in range(1000):
            gated_lora_(y_TN, x_TK, layer.number)
    assert x_TK._use_count() == 1
    assert y_TN._use_count() == 1


def test_without_the_stable_interface_python_stays(monkeypatch):
    monkeypatch.setattr(cpu_op, "_FUNCTIONS", ("no_such_function",))
    monkeypatch.setattr(cpu_op, "_python", torch.library.Library("vllm_lora_ext", "FRAGMENT"))
    assert cpu_op.install.__wrapped__() is None
    assert cpu_op._python is not None


def test_a_block_without_experts_stays_in_c():
    """`mix_act_` comes to Python while a slot has experts, and its linears listen no longer."""
    rng = np.random.default_rng(11)
    gate = GateSpec(source="router", blocks=(3, 3), score="softmax", weight="renormalise")
    first = Site(1, 16, (12, 12), 8, 8, torch.float32, "cpu")
    last = Site(1, 12, (16,), 8, 8, torch.float32, "cpu")
    block = BlockSite(first, last, lambda x: x[:, :12] * x[:, 12:])
    number, calls = register_block(block), []
    block.mix_act_ = lambda a, gate_up: calls.append(len(a))
    a_TI, gate_up_TN = torch.zeros(5, 12), torch.zeros(5, 24)
    mix_act_(a_TI, gate_up_TN, number)
    assert (calls, first.after, last.after) == ([], [], [])
    parts = [random_module(rng, 16, 12, gate), RoutedModule(normal(rng, 6, 16), normal(rng, 12, 6))]
    block.write(0, gate, parts, RoutedModule(normal(rng, 6, 12), normal(rng, 16, 6)))
    mix_act_(a_TI, gate_up_TN, number)
    assert (calls, len(first.after), len(last.after)) == ([5], 1, 1)
    block.clear(0)
    mix_act_(a_TI, gate_up_TN, number)
    assert (calls, first.after, last.after) == ([5], [], [])
