"""The Triton kernels against the reference: compiled where there is a GPU, else interpreted.

Triton decides that when it is first imported, so without a GPU one test runs this same file again
in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.make_adapters import normal, random_module, random_spec
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gate_expand_,
    gated_lora_,
    gated_lora_reference,
    register_site,
    shrink,
)
from vllm_lora_ext.kernels.gated_lora.step import TILE_ROWS, max_tiles
from vllm_lora_ext.kernels.gated_lora.tuning import Device, blocks, splits
from vllm_lora_ext.routing import GateSpec

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HERE = Path(__file__)
runs_kernels = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="in a process of its own"
)
# Of the norm of the difference over the norm of what is expected.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
SOURCES = ("none", "router", "self", "prototype")


@pytest.mark.skipif(ON_GPU or os.environ.get("TRITON_INTERPRET") == "1", reason="not needed")
def test_this_file_interpreted():
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    run = subprocess.run(
        command, cwd=HERE.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
def test_kernels_compile_for_a_gpu_that_is_not_there():
    """The interpreter takes much that the compiler refuses."""
    script = HERE.with_name("triton_compile.py")
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(script), "90"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("compiled\n")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="once is enough")
def test_benchmark_runs_and_checks_its_cases():
    script = HERE.parents[2] / "benchmarks/kernels/bench_gated_lora.py"
    run = subprocess.run(
        [sys.executable, str(script), "--tiny"], capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "checked 8 cases, measured nothing\n", run.stderr[-3000:]


class Batch:
    """A site whose unused memory is NaN, adapters in some slots, and a step's rows."""

    def __init__(self, seed, t, sizes=(13, 7, 7), k=24, slots=4, max_rank=40, dtype=torch.float32):
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.sizes, self.k, self.dtype = sizes, k, dtype
        self.site = Site(slots, k, sizes, max_rank, max_rank, dtype, DEVICE, triton=True)
        for buffer in (self.site.rows_SRK, self.site.b_SRN, self.site.router_SGK):
            buffer.fill_(float("nan"))
        self.site.tables.floats_SF.fill_(float("nan"))
        self.slots = [[None] * len(sizes) for _ in range(slots)]
        self.site.step = StepMap(max(t, 1) + 5, DEVICE, tiled=True)
        self.number = register_site(self.site)
        self.x_TK = torch.randn(t, k).to(dtype).to(DEVICE)
        self.map(self.rng.integers(-1, slots, t))

    def map(self, slots_T):
        self.slots_T = np.asarray(slots_T)
        self.site.step.update(self.slots_T)

    def fill(self, slot, modules):
        """The reference gets the weights as the site stores them: A and B rounded to its dtype,
        routers not."""
        self.site.write(slot, modules)
        self.slots[slot] = [m and self._rounded(m) for m in modules]

    def _rounded(self, m):
        return replace(m, a_RK=m.a_RK.to(self.dtype).float(), b_NR=m.b_NR.to(self.dtype).float())

    def fill_at_random(self, max_rank=40, sources=SOURCES, empty=()):
        for slot in range(len(self.slots)):
            if slot not in empty:
                self.fill(slot, [self.module(n, max_rank, sources) for n in self.sizes])
        return self

    def module(self, n, max_rank=40, sources=SOURCES):
        if self.rng.random() < 0.2:
            return None
        return random_module(self.rng, self.k, n, random_spec(self.rng, max_rank, sources))

    def run(self):
        y_TN = torch.zeros(len(self.x_TK), sum(self.sizes), dtype=self.dtype, device=DEVICE)
        gated_lora_(y_TN, self.x_TK, self.number)
        return y_TN.cpu()

    def expected(self):
        slots_T = torch.from_numpy(self.slots_T)
        return gated_lora_reference(self.x_TK.cpu(), slots_T, self.slots, self.sizes)

    def error(self):
        got, want = self.run().float(), self.expected()
        assert torch.isfinite(got).all()
        assert not got[self.slots_T < 0].any()
        return ((got - want).norm() / want.norm().clamp_min(1e-9)).item()


def gated(e, r, **fields):
    return GateSpec(source="router", blocks=(r,) * e, **fields)


def top_k(e, r, k):
    return gated(e, r, score="softmax", select="top_k", k=k, weight="renormalise")


@runs_kernels
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("seed", range(12))
def test_any_gates_in_mixed_batches(seed, dtype):
    t = (1, 5, 17, 33, 70, 130)[seed % 6]
    batch = Batch(seed, t, dtype=dtype).fill_at_random(empty=(2,))
    assert batch.error() < TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("e", "r", "k"),
    [(1, 1, 1), (8, 8, 2), (8, 6, 8), (4, 12, 1), (3, 48, 2), (32, 2, 5), (28, 8, 2), (64, 1, 8),
     (2, 64, 1), (5, 3, 4)],
)  # fmt: skip
def test_top_k_of_experts(e, r, k, dtype):
    batch = Batch(e * r + k, 21, sizes=(40,), k=72, slots=2, max_rank=224, dtype=dtype)
    for slot in range(2):
        batch.fill(slot, [random_module(batch.rng, 72, 40, top_k(e, r, k))])
    assert batch.error() < TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("t", [1, 16, 64, 65, 513, 600])
def test_every_row_of_the_tuning_table(t):
    batch = Batch(t, t, sizes=(200, 33), k=520, slots=3).fill_at_random()
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
def test_hidden_size_of_a_real_model():
    batch = Batch(3, 9, sizes=(1100,), k=4096, dtype=torch.bfloat16)
    batch.fill(0, [random_module(batch.rng, 4096, 1100, top_k(8, 4, 2))])
    batch.fill(3, [random_module(batch.rng, 4096, 1100, GateSpec(), rank=16)])
    assert batch.error() < TOLERANCE[torch.bfloat16]


@runs_kernels
@pytest.mark.parametrize("slots", [1, 16])
def test_every_slot_in_one_batch(slots):
    batch = Batch(slots, 80, slots=slots).fill_at_random()
    batch.map(np.arange(80) % (slots + 1) - 1)
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
def test_plain_routed_rank_wise_and_base_rows_in_one_launch():
    batch = Batch(0, 40, sizes=(24, 24), k=48, max_rank=64)
    fly = GateSpec(source="self", blocks=(1,) * 32, select="top_k", key="abs", k=8, weight="one")
    rank_wise = gated(64, 1, score="sigmoid", select="top_k", k=8, weight="renormalise")
    for slot, spec in enumerate((GateSpec(), top_k(8, 6, 2), rank_wise, fly)):
        batch.fill(slot, [random_module(batch.rng, 48, 24, spec) for _ in range(2)])
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
def test_a_shared_a_has_a_gate_for_each_expert():
    batch = Batch(1, 19, sizes=(30,), k=24, slots=2)
    whole = random_module(batch.rng, 24, 30, gated(4, 5, score="softmax"))
    batch.fill(1, [replace(whole, a_RK=whole.a_RK[:5])])
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
@pytest.mark.parametrize("key", ["signed", "abs"])
def test_ties_go_to_the_lower_index(key):
    """Equal logits: experts 1 and 2 of (x, 3x, 3x, 3x) are the top two."""
    batch = Batch(2, 6, sizes=(8,), k=16, slots=1)
    batch.map([0] * 6)
    spec = gated(4, 2, select="top_k", key=key, k=2, weight="one")
    module = random_module(batch.rng, 16, 8, spec)
    row_K = module.router_GK[:1].abs()
    batch.fill(0, [replace(module, router_GK=torch.cat([row_K, row_K * 3, row_K * 3, row_K * 3]))])
    batch.x_TK.abs_()
    assert batch.error() < TOLERANCE[torch.float32]
    b_NR = module.b_NR.clone()
    b_NR[:, 6:] = float("inf")  # expert 3 would show
    batch.site.write(0, [replace(module, b_NR=b_NR, router_GK=batch.slots[0][0].router_GK)])
    assert torch.isfinite(batch.run()).all()


@runs_kernels
def test_routers_are_not_rounded_to_the_models_dtype():
    """Two experts whose logits differ by less than bf16 holds: the choice is that of fp32."""
    batch = Batch(4, 64, sizes=(16,), k=64, slots=1, dtype=torch.bfloat16)
    batch.map([0] * 64)
    module = random_module(batch.rng, 64, 16, top_k(2, 4, 1))
    row_K = normal(batch.rng, 64)
    close = torch.stack([row_K, row_K + normal(batch.rng, 64) * 1e-3])
    batch.fill(0, [replace(module, router_GK=close)])
    assert batch.error() < TOLERANCE[torch.bfloat16]


@runs_kernels
def test_an_expert_without_rows_and_one_with_all():
    batch = Batch(5, 24, sizes=(16,), k=32, slots=1)
    batch.map([0] * 24)
    module = random_module(batch.rng, 32, 16, top_k(3, 4, 1))
    router_GK = torch.stack([-torch.ones(32), torch.ones(32), torch.zeros(32)])
    batch.fill(0, [replace(module, router_GK=router_GK)])
    batch.x_TK.abs_()
    assert batch.error() < TOLERANCE[torch.float32]
    poisoned = module.b_NR.clone()
    poisoned[:, :4] = poisoned[:, 8:] = float("nan")
    batch.site.write(0, [replace(module, b_NR=poisoned, router_GK=router_GK)])
    assert torch.isfinite(batch.run()).all()  # closed gates: their B is not read


@runs_kernels
@pytest.mark.parametrize("t", [3, 100])
def test_equal_runs_give_equal_bits(t):
    batch = Batch(6, t, sizes=(64, 16), k=1024, dtype=torch.bfloat16).fill_at_random()
    first = batch.run()
    assert first.any()
    assert all(torch.equal(batch.run(), first) for _ in range(3))


@runs_kernels
def test_only_the_rows_and_columns_of_the_slices_change():
    """y is wider than the slices and starts at `y_start`; other columns and rows stay NaN."""
    batch = Batch(7, 9, sizes=(12,))
    batch.fill(0, [random_module(batch.rng, 24, 12, top_k(4, 3, 2))])
    batch.map([0, -1, 0, 1, 0, 0, -1, 0, 0])
    batch.site.y_start = 5
    y_TN = torch.full((9, 30), float("nan"), device=DEVICE)
    y_TN[:, 5:17] = 1
    gated_lora_(y_TN, batch.x_TK, batch.number)
    y_TN = y_TN.cpu()
    torch.testing.assert_close(y_TN[:, 5:17] - 1, batch.expected(), rtol=1e-4, atol=1e-5)
    assert y_TN[:, :5].isnan().all() and y_TN[:, 17:].isnan().all()


@runs_kernels
def test_base_batches_padding_rows_and_rows_of_an_older_step():
    batch = Batch(8, 20).fill_at_random()
    batch.map([0] * 20)
    assert batch.run().any()
    batch.map([1] * 7)  # a graph captured for 20 rows runs a step of 7
    y_TN = batch.run()
    assert not y_TN[7:].any()
    batch.slots_T = np.array([1] * 7 + [-1] * 13)
    torch.testing.assert_close(y_TN, batch.expected(), rtol=1e-4, atol=1e-5)
    batch.map([-1] * 20)
    assert not batch.run().any()
    assert not batch.site.step.active


@runs_kernels
def test_a_cleared_slot_adds_nothing_and_a_new_adapter_replaces_all_of_the_old():
    batch = Batch(9, 12).fill_at_random()
    batch.map([0] * 12)
    batch.site.clear(0)
    assert not batch.run().any()
    batch.fill(0, [None, random_module(batch.rng, 24, 7, GateSpec(), rank=3), None])
    assert batch.error() < TOLERANCE[torch.float32]
    assert not batch.run()[:, :13].any()


@runs_kernels
@pytest.mark.parametrize("seed", range(4))
def test_a_sharded_input_is_summed_between_the_launches(seed):
    whole = Batch(seed, 18, sizes=(16,), slots=2)
    module = random_module(whole.rng, 24, 16, random_spec(whole.rng, sources=SOURCES[1:]))
    whole.fill(1, [module])
    shards = []
    for rank in range(2):
        k, n = slice(12 * rank, 12 * rank + 12), slice(8 * rank, 8 * rank + 8)
        part = replace(
            module, a_RK=module.a_RK[:, k], b_NR=module.b_NR[n],
            router_GK=None if module.router_GK is None else module.router_GK[:, k],
            head_K=None if module.head_K is None else module.head_K[k],
        )  # fmt: skip
        shard = Batch(seed, 18, sizes=(8,), k=12, slots=2)
        shard.fill(1, [part])
        shard.site.y_start = 8 * rank
        shard.x_TK = whole.x_TK[:, k]
        shards.append(shard)
    u_TR = sum(shrink(s.x_TK, s.number, s.site.num_rows) for s in shards)
    assert torch.isfinite(u_TR).all()
    before, y_TN = u_TR.clone(), torch.zeros(18, 16, device=DEVICE)
    for shard in shards:
        gate_expand_(y_TN, u_TR, shard.number)
    torch.testing.assert_close(y_TN.cpu(), whole.expected(), rtol=1e-4, atol=1e-5)
    assert torch.equal(u_TR, before)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA graph")
def test_a_captured_graph_follows_the_step_it_runs_in():
    batch = Batch(10, 40, sizes=(64,), k=64).fill_at_random(sources=("router", "self", "none"))
    batch.map([0] * 40)
    batch.run()
    y_TN, graph = torch.zeros(40, 64, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gated_lora_(y_TN, batch.x_TK, batch.number)
    for slots_T in ([1] * 40, [3] * 9, np.arange(40) % 5 - 1):
        batch.map(slots_T)
        y_TN.zero_()
        graph.replay()
        batch.slots_T = np.concatenate([slots_T, np.full(40 - len(slots_T), -1)])
        torch.testing.assert_close(y_TN.cpu(), batch.expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_tiles_hold_every_row_once_and_stay_below_their_bound(seed):
    rng = np.random.default_rng(seed)
    t, slots = int(rng.integers(0, 200)), int(rng.integers(1, 17))
    slots_T = rng.integers(-1, slots, t)
    step = StepMap(200, tiled=True)
    step.update(rng.integers(-1, slots, int(rng.integers(0, 200))))
    step.update(slots_T)
    assert step.token_slots_T[:t].tolist() == slots_T.tolist()
    assert not (step.token_slots_T[t:] >= 0).any()
    order = step.order_T.tolist()
    for rows in TILE_ROWS:
        tiles = [tile for tile in step.tiles(rows).t().tolist() if tile[0] >= 0]
        assert (step.tiles(rows)[0, len(tiles) :] == -1).all()
        assert len(tiles) <= max_tiles(t, slots, rows)
        seen = [(token, slot) for slot, start, stop in tiles for token in order[start:stop]]
        assert sorted(seen) == [(i, s) for i, s in enumerate(slots_T.tolist()) if s >= 0]
        assert all(0 < stop - start <= rows for _, start, stop in tiles)


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_blocks_fit_a_multiprocessor_and_splits_are_powers_of_two(shared_kib):
    device = Device("x", 100, shared_kib * 1024)
    for ranks in (16, 64, 128, 256, 512):
        for tokens in (1, 16, 17, 64, 65, 512, 513, 8192):
            for itemsize in (2, 4):
                s, e = blocks(tokens, ranks, itemsize, device)
                assert s.tile in TILE_ROWS and e.tile in TILE_ROWS
                held = e.tile * ranks + e.stages * ranks * e.columns
                assert held * itemsize <= device.shared_bytes
                assert e.walk % e.columns == 0
                parts = splits(tokens, 13, 4096, s, device)
                assert parts & (parts - 1) == 0 and 1 <= parts <= 8
