"""No per-step path of the kernels makes the host wait for the device.

The path runs on tensors without memory, up to the launches, with a double in place of the host
(`host_syncs`). On a GPU the same is asked of CUDA itself.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.host_syncs import host_syncs, page_locked  # noqa: F401
from tests.make_adapters import normal, random_module
from vllm_lora_ext.kernels.gated_lora import (
    EmbeddingSite,
    Factors,
    Site,
    StepMap,
    begin,
    finish_,
    prefetch,
    prefetch_in_order,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.op import (  # the ops themselves take no meta
    _activated_lora,
    _extended_linear,
    embedding_lora_static_,
)
from vllm_lora_ext.kernels.mix_mlp import BlockSite, register_block, scratch_for
from vllm_lora_ext.kernels.mix_mlp.op import _block_mix
from vllm_lora_ext.routing import GateSpec

pytest.importorskip("triton")
ROUTER = GateSpec(
    source="router", blocks=(4,) * 4, score="softmax", bias="select", select="top_k", k=2,
    weight="renormalise",
)  # fmt: skip
K, SIZES, RANK, MOST = 64, (48, 16, 16), 16, 64


class Launches:
    """In place of a kernel: counts."""

    count = 0

    def __getitem__(self, _grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        self.count += 1


@pytest.fixture
def launches(monkeypatch):
    from vllm_lora_ext.kernels.gated_lora.backends.triton import (
        expand,
        extended,
        glu,
        shrink,
    )
    from vllm_lora_ext.kernels.gated_lora.backends.triton import prefetch as fetching
    from vllm_lora_ext.kernels.mix_mlp.backends.triton import mix

    counted = Launches()
    for module, name in (
        (shrink, "shrink_kernel"), (expand, "expand_kernel"), (mix, "mix_kernel"),
        (extended, "extended_kernel"), (glu, "glu_kernel"), (fetching, "prefetch_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counted)
    return counted


def step_map():
    step = StepMap(MOST, "meta", tiled=True)
    assert len(step.rows_TC)  # made before graphs are captured, or when an adapter needs it
    step.device = SimpleNamespace(type="cuda")  # what decides where its copies come from
    return step


def site(sizes=SIZES, k=K):
    return Site(4, k, sizes, RANK, 8, torch.bfloat16, "meta", backend=choice.triton())


def packed(on, rng, sizes, k, page_locked):  # noqa: F811
    """An adapter for a site as the engine holds it: in page-locked memory."""
    modules = [random_module(rng, k, n, ROUTER if i == 0 else GateSpec(), rank=8)
               for i, n in enumerate(sizes)]  # fmt: skip
    shapes = on.shapes(modules)
    return on.pack(modules, [torch.empty(s, dtype=d, pin_memory=True) for s, d in shapes])


SLOTS = np.array([0, 0, 2, -1, 2, 1, -1] * 5)


@pytest.mark.parametrize("slots_T", [SLOTS, SLOTS[:1], np.full(9, -1), SLOTS[:0]])
def test_the_map_of_a_step(slots_T, page_locked):  # noqa: F811
    step = step_map()
    with host_syncs(page_locked) as seen:
        step.update(slots_T)
        step.update(slots_T[: len(slots_T) // 2])
    assert seen == []


def test_the_numbers_of_a_steps_rows(page_locked):  # noqa: F811
    step = step_map()
    with host_syncs(page_locked) as seen:
        step.set_rows(np.ones((5, 3), dtype=np.float32), [slice(2, 5), slice(9, 11)])
    assert seen == []


def test_an_adapter_goes_into_a_slot_and_out(page_locked):  # noqa: F811
    on, rng = site(), np.random.default_rng(0)
    ready = packed(on, rng, SIZES, K, page_locked)
    on.reserve_routers(on.most_routers)  # when it is loaded, not in the step
    with host_syncs(page_locked) as seen:
        on.load(1, ready)
        on.clear(1)
    assert seen == []


def test_both_launches_of_a_layer(launches, page_locked):  # noqa: F811
    on, step = site(), step_map()
    on.step = step
    step.update(SLOTS)
    x_TK = torch.empty(len(SLOTS), K, dtype=torch.bfloat16, device="meta")
    y_TN = torch.empty(len(SLOTS), sum(SIZES), dtype=torch.bfloat16, device="meta")
    with host_syncs(page_locked) as seen:
        finish_(y_TN, x_TK, begin(x_TK, on), on)
    assert seen == [] and launches.count == 2


@pytest.mark.parametrize("select", [{"k": 2, "select": "top_k"}, {"top_p": 0.6, "select": "top_p"}])
def test_a_layer_in_pytorch(select, page_locked):  # noqa: F811
    """On a GPU without Triton; rows of a slot that lie apart, and gates of uneven blocks."""
    gate = GateSpec(source="router", blocks=(4, 4, 3, 5), score="softmax", bias="select", **select)
    on = Site(4, K, SIZES, RANK, 8, torch.bfloat16, "meta", backend=choice.eager)
    on.step, rng = step_map(), np.random.default_rng(0)
    modules = [random_module(rng, K, n, gate, rank=RANK) for n in SIZES]
    out = [torch.empty(s, dtype=d, pin_memory=True) for s, d in on.shapes(modules)]
    ready = on.pack(modules, out)
    on.reserve_routers(on.most_routers)
    x_TK = torch.empty(len(SLOTS), K, dtype=torch.bfloat16, device="meta")
    y_TN = torch.empty(len(SLOTS), sum(SIZES), dtype=torch.bfloat16, device="meta")
    on.load(2, ready)  # waits for the gate's vectors; the kernels' tables do not
    with host_syncs(page_locked) as seen:
        on.step.update(SLOTS)
        finish_(y_TN, x_TK, begin(x_TK, on), on)
        on.clear(2)
    assert seen == []


def test_weights_that_are_fetched_beside_a_product(launches, page_locked):  # noqa: F811
    """Of this layer and the next; an adapter with a router goes in, and out."""
    on, after, step = site(), site((K,), 48), step_map()
    on.step = after.step = step
    ready = packed(on, np.random.default_rng(0), SIZES, K, page_locked)
    on.reserve_routers(on.most_routers)
    prefetch_in_order([on, after])
    x_TK = torch.empty(len(SLOTS), K, dtype=torch.bfloat16, device="meta")
    with host_syncs(page_locked) as seen:
        on.load(1, ready)
        for slots_T in (SLOTS, np.full(9, -1)):
            step.update(slots_T)
            for one in (on, after):
                prefetch(x_TK, one)
        on.clear(1)
    assert seen == [] and launches.count == 2  # none in the step of the base model


def test_a_sharded_layer_in_graphs(launches, page_locked):  # noqa: F811
    on = Site(4, K, SIZES, RANK, 8, torch.bfloat16, "meta", backend=choice.triton(),
              reduce=lambda u: u.clone(), static=True)  # fmt: skip
    on.step = step_map()
    on.step.update(SLOTS)
    on.step.frozen = True  # a graph is being captured
    x_TK = torch.empty(len(SLOTS), K, dtype=torch.bfloat16, device="meta")
    y_TN = torch.empty(len(SLOTS), sum(SIZES), dtype=torch.bfloat16, device="meta")
    with host_syncs(page_locked) as seen:
        finish_(y_TN, x_TK, begin(x_TK, on), on)
    assert seen == [] and launches.count == 2


def test_a_layer_with_rows_below_its_weight(launches, page_locked):  # noqa: F811
    """One product and one launch; an adapter goes in, and out."""
    base_NK = torch.empty(sum(SIZES), K, dtype=torch.bfloat16, device="meta")
    on = Site(4, K, SIZES, RANK, 8, torch.bfloat16, "meta", choice.triton(), base_NK=base_NK)
    handle, rng = register_site(on), np.random.default_rng(0)
    on.step = step_map()
    ready = packed(on, rng, SIZES, K, page_locked)
    on.reserve_routers(on.most_routers)
    x_TK = torch.empty(len(SLOTS), K, dtype=torch.bfloat16, device="meta")
    with host_syncs(page_locked) as seen:
        on.load(1, ready)
        on.step.update(SLOTS)
        _extended_linear(x_TK, x_TK.new_empty(sum(SIZES)), handle, sum(SIZES))
        on.clear(1)
    assert seen == [] and launches.count == 1


@pytest.mark.parametrize("slots_T", [SLOTS, np.full(9, -1)])
def test_a_layer_that_activates(slots_T, launches, page_locked):  # noqa: F811
    on = site((K, K))
    on.activation, on.step = "silu", step_map()
    handle, t = register_site(on), len(slots_T)
    x_TK, y_TN = (torch.empty(t, n, dtype=torch.bfloat16, device="meta") for n in (K, 2 * K))
    with host_syncs(page_locked) as seen:
        on.step.update(slots_T)
        assert _activated_lora(y_TN, x_TK, handle, K).shape == (t, K)
    assert seen == [] and launches.count == (2 if on.step.active else 1)


@pytest.mark.parametrize("fully", [False, True])
def test_a_sharded_layer_outside_of_graphs(fully, launches, page_locked):  # noqa: F811
    """What its gates read is summed for the rows that have one, of slots whose rows lie apart."""
    on = Site(4, K, SIZES, RANK, 8, torch.bfloat16, "meta", backend=choice.triton(),
              reduce=lambda u: u.clone(), x_part=slice(0, K) if fully else None)  # fmt: skip
    on.load(1, packed(on, np.random.default_rng(0), SIZES, K, page_locked))
    on.step = step_map()
    on.step.update(SLOTS)
    x_TK = torch.empty(len(SLOTS), K, dtype=torch.bfloat16, device="meta")
    y_TN = torch.empty(len(SLOTS), sum(SIZES), dtype=torch.bfloat16, device="meta")
    with host_syncs(page_locked) as seen:
        on.step.update(SLOTS)
        finish_(y_TN, x_TK, begin(x_TK, on), on)
    assert seen == [] and launches.count == 2


def test_an_embedding(page_locked):  # noqa: F811
    """The launches that a graph holds, of an adapter with a number for each row."""
    a_SVR, b_SNR = (torch.empty(4, n, RANK, dtype=torch.bfloat16, device="meta") for n in (9, K))
    on = EmbeddingSite(a_SVR, b_SNR, step_map(), {1}, Factors(4, RANK, a_SVR.device))
    columns_R = torch.empty(RANK, dtype=torch.int64, pin_memory=True).zero_()
    ids_T = torch.empty(len(SLOTS), dtype=torch.int64, device="meta")
    with host_syncs(page_locked) as seen:
        on.factors.set(1, columns_R)
        on.step.update(SLOTS)
        embedding_lora_static_(ids_T.new_empty(len(SLOTS), K, dtype=torch.bfloat16), ids_T, on)
    assert seen == []


def test_an_mlp_block(launches, page_locked):  # noqa: F811
    from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import num_parts
    from vllm_lora_ext.kernels.mix_mlp.backends.triton.mix import mix_

    first, last = site((32, 32)), site((K,), 32)
    block = BlockSite(first, last, torch.relu, act_name="silu")
    first.step = last.step = step_map()
    first.step.update(SLOTS)
    t = len(SLOTS)
    u_PTR, z_PTR = (
        torch.empty(num_parts(t, torch.bfloat16, s), t, s.num_rows, device="meta")
        for s in (first, last)
    )
    a_TI, base_TN = (torch.empty(t, n, dtype=torch.bfloat16, device="meta") for n in (32, 64))
    with host_syncs(page_locked) as seen:
        mix_(a_TI, z_PTR, base_TN, u_PTR, block)
    assert seen == [] and launches.count == 1


@pytest.mark.parametrize("on_kernels", [True, False])
def test_an_adapter_of_an_mlp_block(on_kernels, launches, page_locked):  # noqa: F811
    """Goes in, computes as the block's ops have it, and goes out; one whose activation the kernel
    lacks does so in PyTorch, for rows of a slot that lie apart and for those that do not."""
    first, last, step = site((32, 32)), site((K,), 32), step_map()
    block = BlockSite(first, last, torch.nn.functional.glu, act_name="silu" if on_kernels else None)
    first.step = last.step = step
    handle, rng = register_block(block), np.random.default_rng(0)
    gate = replace(ROUTER, bias="none")
    parts = [random_module(rng, K, 32, spec, rank=RANK) for spec in (gate, GateSpec())]
    down = random_module(rng, 32, K, GateSpec(), rank=RANK)
    shapes = block.shapes(parts, down)
    out = [torch.empty(s, dtype=d, pin_memory=True) for s, d in shapes]
    packed = block.pack(gate, parts, down, out=out)
    assert packed.on_kernels == on_kernels
    first.reserve_routers(first.most_routers)
    t = len(SLOTS)
    gate_up_TN, x_TK, a_TI, y_TN = (
        torch.empty(t, n, dtype=torch.bfloat16, device="meta") for n in (64, K, 32, K)
    )
    memory = scratch_for([block], MOST, torch.bfloat16)
    with host_syncs(page_locked) as seen:
        block.load(2, packed)
        step.update(SLOTS)
        finish_(gate_up_TN, x_TK, begin(x_TK, first, memory.u), first)
        _block_mix(a_TI, memory.z, gate_up_TN, memory.u, handle)
        finish_(y_TN, a_TI, begin(a_TI, last, memory.z), last)
        block.clear(2)
    assert seen == [] and launches.count > 0


@pytest.mark.parametrize("slots_T", [SLOTS, np.full(9, -1)])
def test_a_layer_whose_shrink_stays_in_shared_memory(slots_T, launches, page_locked):  # noqa: F811
    """Both linears of an MLP block, as `gated_lora_into_` runs them."""
    on, t = site(), len(slots_T)
    on.step = step_map()
    x_TK, y_TN = (torch.empty(t, n, dtype=torch.bfloat16, device="meta") for n in (K, sum(SIZES)))
    memory = torch.empty(8 * MOST * on.num_rows, device="meta")
    with host_syncs(page_locked) as seen:
        on.step.update(slots_T)
        finish_(y_TN, x_TK, begin(x_TK, on, memory), on)
    assert seen == [] and launches.count == (2 if on.step.active else 0)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: int(x[0]), lambda x: x.cpu(), lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.tolist(),
        lambda x: x.copy_(torch.ones(4)), lambda x: x.copy_(torch.ones(4), non_blocking=True),
        lambda x: torch.tensor([1.0], device="meta"), lambda x: bool(x[0] > 1),
        lambda x: torch.ones(4).to("meta", non_blocking=True), lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.ones(4).copy_(x),
    ],
)  # fmt: skip
def test_the_double_sees_whatever_waits(wait, page_locked):  # noqa: F811
    x = torch.empty(4, device="meta")
    with host_syncs(page_locked) as seen, suppress(NotImplementedError, RuntimeError):
        wait(x)  # meta tensors have no numbers
    assert len(seen) >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees():
    step = StepMap(MOST, "cuda")
    on = Site(4, K, SIZES, RANK, 8, torch.bfloat16, "cuda", backend=choice.triton())
    on.step = step
    x_TK = normal(np.random.default_rng(0), len(SLOTS), K).cuda().bfloat16()
    y_TN = torch.zeros(len(SLOTS), sum(SIZES), dtype=torch.bfloat16, device="cuda")
    for _ in range(2):  # the first one compiles
        step.update(SLOTS)
        finish_(y_TN, x_TK, begin(x_TK, on), on)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
