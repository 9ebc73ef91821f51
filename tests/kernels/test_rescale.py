"""Adapters that rescale a layer's own output (DoRA), beside others: every backend of a CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.compiled import need_compiled
from tests.make_adapters import normal, random_module, random_spec
from tests.ranks import Ranks
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gated_lora_,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native
from vllm_lora_ext.routing import GateSpec, Rescale

SLOTS, RANK, NAN, PLAIN = 4, 40, float("nan"), GateSpec()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu_native, "tables", lambda *_: None)
    else:
        need_compiled()
    return request.param


def random_rescale(rng, n):
    return Rescale(normal(rng, n) * 0.3 + 1, normal(rng, n))


class Layer:
    """Slot 0: DoRA on some slices; 1: any gates; 2: nothing; 3: DoRA on all slices."""

    def __init__(self, seed, sizes=(13, 7, 7), k=24, dtype=torch.float32):
        self.rng = np.random.default_rng(seed)
        self.sizes, self.k = sizes, k
        self.site = Site(SLOTS, k, sizes, RANK, RANK, dtype, "cpu")
        self.site.reserve_routers(self.site.most_routers)
        self.site.reserve_rescale()
        buffers = self.site.a_SRK, self.site.router_SGK, self.site.rescale_S2N
        for buffer in (*buffers, *self.site.bt_SRN):
            buffer.fill_(NAN)
        self.site.step = StepMap(64)
        self.handle = register_site(self.site)
        self.slots = [[None] * len(sizes) for _ in range(SLOTS)]
        for slot in (0, 1, 3):
            for i, n in enumerate(sizes):
                dora = slot == 3 or (slot == 0 and (i == 0 or self.rng.random() < 0.5))
                spec = PLAIN if dora else random_spec(self.rng)
                module = random_module(self.rng, k, n, spec)
                if dora:
                    module = replace(module, rescale=random_rescale(self.rng, n))
                self.slots[slot][i] = module if dora or self.rng.random() < 0.8 else None
            self.site.write(slot, self.slots[slot])

    def run(self, slots_T, x_TK, y_TN):
        self.site.step.update(slots_T)
        y_TN = y_TN.clone()
        gated_lora_(y_TN, x_TK, self.handle)
        return y_TN

    def want(self, slots_T, x_TK, y_TN):
        added_TN = gated_lora_reference(
            x_TK, torch.tensor(slots_T), self.slots, self.sizes, y_TN=y_TN
        )
        return y_TN.float() + added_TN


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_beside_others(path, seed, dtype):
    """Both launches at once, one after the other, and without Python on the way."""
    rng = np.random.default_rng(seed)
    k, sizes = int(rng.integers(1, 70)), tuple(rng.integers(1, 90, rng.integers(1, 4)).tolist())
    layer = Layer(seed, sizes, k)
    for t in (1, 7, 33):
        slots_T = np.array([3 * (seed % 2), *rng.integers(-1, SLOTS, t - 1)])
        x_TK, y_TN = normal(rng, t, k).to(dtype), normal(rng, t, sum(sizes)).to(dtype)
        want_TN = layer.want(slots_T, x_TK, y_TN)
        backend, apart_TN = layer.site.backend, y_TN.clone()
        results = [layer.run(slots_T, x_TK, y_TN) for _ in range(2)]
        backend.expand_(apart_TN, backend.shrink(x_TK, layer.site), layer.site)
        for got_TN in (*results, apart_TN):
            assert torch.isfinite(got_TN).all()
            assert (got_TN.float() - want_TN).norm() / want_TN.norm() < TOLERANCE[dtype]
            untouched = (slots_T < 0) | (slots_T == 2)
            assert torch.equal(got_TN[untouched], y_TN[untouched])


def test_rows_of_others_keep_every_bit(path):
    """A DoRA in the batch, or gone from its slot, is nothing to them."""
    layer, rng = Layer(0), np.random.default_rng(1)
    x_TK, y_TN = normal(rng, 6, 24), normal(rng, 6, 27)
    mixed = layer.run(np.array([1, -1, 3, 1, 0, 2]), x_TK, y_TN)
    layer.site.clear(3)
    layer.site.clear(0)
    alone = layer.run(np.array([1, -1, 3, 1, 0, 2]), x_TK, y_TN)
    assert torch.equal(mixed[[0, 1, 3, 5]], alone[[0, 1, 3, 5]])
    assert torch.equal(alone[[2, 4]], y_TN[[2, 4]])
    layer.site.write(3, layer.slots[1])
    layer.slots[3] = layer.slots[1]
    slots_T = np.array([3, 3, 1, -1, 3, 1])
    got = layer.run(slots_T, x_TK, y_TN)
    torch.testing.assert_close(got, layer.want(slots_T, x_TK, y_TN), rtol=1e-4, atol=1e-4)


def test_closed_or_missing_deltas_leave_the_scale(path):
    """B of zeros: what is left is the scale and the shift."""
    layer, rng = Layer(2, (16,)), np.random.default_rng(2)
    module = layer.slots[3][0]
    layer.slots[3] = [replace(module, b_NR=torch.zeros_like(module.b_NR))]
    layer.site.write(3, layer.slots[3])
    x_TK, y_TN = normal(rng, 5, 24), normal(rng, 5, 16)
    got = layer.run(np.full(5, 3), x_TK, y_TN)
    scale_N, shift_N = module.rescale
    torch.testing.assert_close(got, y_TN * scale_N + shift_N)


def test_who_does_not_rescale_has_no_memory_for_it():
    """Slots that are copied into, as on a GPU."""
    site = Site(2, 24, (16,), RANK, RANK, torch.float32, "cpu", choice.triton())
    rng = np.random.default_rng(0)
    plain = random_module(rng, 24, 16, PLAIN)
    assert len(site.shapes([plain])) == len(site.pack([plain]).stored) + 2
    site.write(0, [plain])
    assert site.rescale_S2N is None
    dora = replace(plain, rescale=random_rescale(rng, 16))
    assert len(site.shapes([dora])) == len(site.pack([dora]).stored) + 3
    site.write(1, [dora])
    assert site.rescale_S2N.shape == (2, 2, 16)


def test_in_a_composed_slot_only_alone():
    layer, rng = Layer(3), np.random.default_rng(3)
    plain = [random_module(rng, 24, n, PLAIN) for n in layer.sizes]
    dora, other = layer.site.pack(layer.slots[3]), layer.site.pack(plain)
    layer.site.load(3, layer.site.compose([(dora, 1.0, -1, 0), (None, 1.0, -1, 0)]))
    slots_T, x_TK, y_TN = np.array([3, -1, 3]), normal(rng, 3, 24), normal(rng, 3, 27)
    want = layer.want(slots_T, x_TK, y_TN)
    torch.testing.assert_close(layer.run(slots_T, x_TK, y_TN), want, rtol=1e-4, atol=1e-4)
    for parts in (
        [(dora, 0.5, -1, 0)], [(dora, 1.0, 0, 0)], [(dora, 1.0, -1, 0), (other, 1.0, -1, 0)],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="alone"):
            layer.site.compose(parts)


def test_partial_sums_of_two_ranks(path):
    """Each scales its own part of y; the shift stands on one of them."""
    rng, ranks = np.random.default_rng(4), Ranks()
    module = replace(random_module(rng, 24, 14, PLAIN), rescale=random_rescale(rng, 14))
    router = random_module(rng, 24, 14, GateSpec(source="router", blocks=(2, 3), score="softmax"))
    slots_T = np.array([0, -1, 1, 0, 1])
    x_TK, weight_NK = normal(rng, 5, 24), normal(rng, 14, 24)
    step, handles, sites = StepMap(8), [], []
    step.update(slots_T)
    for rank in range(2):
        site = Site(2, 12, (14,), RANK, RANK, torch.float32, "cpu", reduce=ranks.sum_)
        site.step = step
        own = slice(12 * rank, 12 * rank + 12)
        scale_N, shift_N = module.rescale
        rescale = Rescale(scale_N, shift_N if rank == 0 else torch.zeros_like(shift_N))
        site.write(0, [replace(module, a_RK=module.a_RK[:, own], rescale=rescale)])
        site.write(1, [replace(router, a_RK=router.a_RK[:, own],
                               router_GK=router.router_GK[:, own])])  # fmt: skip
        sites.append(site)
        handles.append(register_site(site))

    def one(rank):
        own = slice(12 * rank, 12 * rank + 12)
        x = x_TK[:, own].contiguous()
        y_TN = x @ weight_NK[:, own].t()
        gated_lora_(y_TN, x, handles[rank])
        return y_TN

    got, y_TN = sum(ranks.run(one)), x_TK @ weight_NK.t()
    want = y_TN + gated_lora_reference(
        x_TK, torch.tensor(slots_T), [[module], [router]], (14,), y_TN=y_TN
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_where_a_rank_has_a_part_of_y_only():
    rng = np.random.default_rng(5)
    module = replace(random_module(rng, 24, 7, PLAIN), rescale=random_rescale(rng, 7))
    site = Site(1, 24, (7,), RANK, RANK, torch.float32, "cpu", y_part=slice(0, 7))
    with pytest.raises(ValueError, match="part"):
        site.write(0, [module])
