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
from tests.ranks import Ranks
from tests.slot_parts import ALL_SOURCES, each, put, random_parts, random_rows
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    begin,
    finish_,
    gated_lora_,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora import selfcheck as checks
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import Device, blocks, splits
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE, SlotPart
from vllm_lora_ext.kernels.gated_lora.selfcheck import selfcheck
from vllm_lora_ext.kernels.gated_lora.step import MAX_COLUMNS, TILE_ROWS, max_tiles
from vllm_lora_ext.routing import GateSpec, Rescale

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HERE = Path(__file__)
runs_kernels = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="in a process of its own"
)
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
NAN = float("nan")
SOURCES = ("none", "router", "self", "prototype")


@pytest.mark.skipif(ON_GPU or os.environ.get("TRITON_INTERPRET") == "1", reason="not needed")
def test_this_file_interpreted():
    command = [
        sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
        *(str(HERE.with_name(f"test_{name}.py"))
          for name in ("triton", "triton_mix", "extension", "glu", "prefetch")),
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=HERE.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="once is enough")
def test_benchmark_needs_only_torch_triton_and_numpy():
    script = HERE.parents[2] / "benchmarks/kernels/bench_gated_lora.py"
    bare = (
        "import sys, runpy;"
        "sys.modules.update(dict.fromkeys(['vllm', 'transformers', 'peft', 'pydantic',"
        " 'safetensors', 'huggingface_hub']));"
        f"sys.argv = ['bench', '--tiny']; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", bare], capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "checked 8 cases, measured nothing\n", run.stderr[-3000:]


class Batch:
    """A site whose unused memory is NaN, adapters in some slots, and a step's rows."""

    def __init__(self, seed, t, sizes=(13, 7, 7), k=24, slots=4, max_rank=40, dtype=torch.float32,
                 reserve=True):  # fmt: skip
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.sizes, self.k, self.dtype = sizes, k, dtype
        self.site = Site(slots, k, sizes, max_rank, max_rank, dtype, DEVICE, choice.triton())
        if reserve:
            self.site.reserve_routers(self.site.most_routers)
        for buffer in (self.site.a_SRK, self.site.store.b_SRN, self.site.router_SGK):
            buffer.fill_(NAN)
        self.site.store.tables.floats_SF.fill_(NAN)
        self.slots = [[None] * len(sizes) for _ in range(slots)]
        self.site.step = StepMap(max(t, 1) + 5, DEVICE, tiled=True)
        self.number = register_site(self.site)
        self.x_TK = torch.randn(t, k).to(dtype).to(DEVICE)
        self.rows_TC = random_rows(np.random.default_rng(seed), t, MAX_COLUMNS)
        self.map(self.rng.integers(-1, slots, t))

    def map(self, slots_T):
        """Rows whose slot has no use for numbers have NaN ones."""
        self.slots_T = np.asarray(slots_T)
        self.site.step.update(self.slots_T)
        if self.site.rows_TC is not None:
            self.site.step.rows_TC.fill_(NAN)
            reads = [i for i, plan in enumerate(self.site.plans) if plan and plan.columns]
            at = np.flatnonzero(np.isin(self.slots_T, reads))
            self.site.step.set_rows(self.rows_TC[at], [slice(i, i + 1) for i in at])

    def fill(self, slot, modules):
        """The reference gets the weights as the site stores them: A and B rounded to its dtype,
        routers not."""
        self.site.write(slot, modules)
        self.slots[slot] = [m and self._rounded(m) for m in modules]

    def compose(self, slot, parts):
        put(self.site, slot, parts)
        self.slots[slot] = each(parts, self._rounded)
        self.map(self.slots_T)

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

    def expected(self, slots=None):
        slots_T = torch.from_numpy(self.slots_T)
        rows_TC = torch.from_numpy(self.rows_TC[: len(slots_T)])
        return gated_lora_reference(
            self.x_TK.cpu(), slots_T, slots or self.slots, self.sizes, rows_TC
        )

    def settled(self):
        """Rows whose gates do not hang on the rounding of their logits: two correct sums in fp32
        may choose other experts where two nearly tie."""
        want = self.expected()
        settled_T = torch.ones(len(want), dtype=torch.bool)
        for _ in range(3):
            moved = self.expected([each(s, self._shaken) for s in self.slots])
            size_T = want.norm(dim=1).clamp_min(1e-6)
            settled_T &= (moved - want).norm(dim=1) < 1e-3 * size_T
        assert settled_T.float().mean() > 0.7
        return settled_T

    def _shaken(self, m):
        if m.router_GK is None:
            return replace(m, a_RK=self._noisy(m.a_RK)) if m.gate.source == "self" else m
        head_K = None if m.head_K is None else self._noisy(m.head_K)
        return replace(m, router_GK=self._noisy(m.router_GK), head_K=head_K)

    def _noisy(self, w):
        return w * (1 + 1e-4 * normal(self.rng, *w.shape))

    def error(self, settled=True):
        got, want = self.run().float(), self.expected()
        assert torch.isfinite(got).all()
        assert not got[self.slots_T < 0].any()
        if settled:
            settled_T = self.settled()
            got, want = got[settled_T], want[settled_T]
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
@pytest.mark.parametrize("t", [1, 20, 70])
def test_slots_that_rescale_the_layers_output(t, dtype):
    """DoRA on all slices, on one, and none; a slot that had one, and has none now."""
    batch = Batch(t, t, sizes=(40, 7), dtype=dtype)
    batch.site.reserve_rescale()
    batch.site.rescale_S2N.fill_(NAN)
    modules = [[random_module(batch.rng, 24, n, GateSpec()) for n in batch.sizes] for _ in range(4)]
    dora = [[_with_rescale(batch.rng, m) for m in slot] for slot in modules]
    batch.fill(0, dora[0])
    batch.fill(1, [modules[1][0], dora[1][1]])
    batch.fill(2, dora[3])
    batch.fill(2, modules[2])
    batch.map([0, *batch.rng.integers(-1, 4, t - 1)])
    y_TN = normal(batch.rng, t, 47).to(dtype)
    got_TN = y_TN.to(DEVICE, copy=True)
    gated_lora_(got_TN, batch.x_TK, batch.number)
    got_TN, slots_T = got_TN.cpu(), torch.from_numpy(batch.slots_T)
    added_TN = gated_lora_reference(batch.x_TK.cpu(), slots_T, batch.slots, batch.sizes, y_TN=y_TN)
    want_TN = y_TN.float() + added_TN
    assert (got_TN.float() - want_TN).norm() / want_TN.norm() < TOLERANCE[dtype]
    assert torch.equal(got_TN[slots_T < 0], y_TN[slots_T < 0])
    assert torch.equal(got_TN[slots_T == 3], y_TN[slots_T == 3])


def _with_rescale(rng, module):
    n = len(module.b_NR)
    return replace(module, rescale=Rescale(normal(rng, n) * 0.3 + 1, normal(rng, n)))


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
@pytest.mark.parametrize("rank", [1, 2, 3, 6, 7, 8, 12, 16, 24, 31, 32, 48, 63, 64])
def test_plain_and_routed_of_every_rank(rank):
    batch = Batch(rank, 11, sizes=(20, 9), k=40, slots=2, max_rank=64)
    batch.map([0] * 5 + [1] * 5 + [-1])
    experts = max(e for e in (1, 2, 3, 4, 8) if e * rank <= 64)
    batch.fill(0, [random_module(batch.rng, 40, n, GateSpec(), rank=rank) for n in (20, 9)])
    batch.fill(
        1, [random_module(batch.rng, 40, n, top_k(experts, rank, min(2, experts))) for n in (20, 9)]
    )
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
@pytest.mark.parametrize("e", [1, 2, 3, 5, 8, 13, 28, 32])
def test_every_k_of_every_number_of_experts(e):
    """One slot for each k of 1, 2, about half, all but one, and all."""
    ks = sorted({1, min(2, e), (e + 1) // 2, max(1, e - 1), e})
    batch = Batch(e, 23, sizes=(18,), k=32, slots=len(ks), max_rank=64)
    for slot, k in enumerate(ks):
        spec = gated(e, 2, score="softmax", select="top_k", k=k, weight="score")
        batch.fill(slot, [random_module(batch.rng, 32, 18, spec)])
    assert batch.error() < TOLERANCE[torch.float32]


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
@pytest.mark.parametrize("slots", [1, 2, 5, 16])
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
@pytest.mark.parametrize("t", [1, 20, 70])
@pytest.mark.parametrize("seed", range(12))
def test_several_adapters_in_a_slot(seed, t):
    sizes = tuple(np.random.default_rng(seed).integers(1, 40, 1 + seed % 3).tolist())
    batch = Batch(seed, t, sizes=sizes, k=19 + seed)
    for slot in (0, 1, 3):
        batch.compose(slot, random_parts(batch.rng, batch.k, sizes, 40))
    batch.map(batch.slots_T)
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(16))
def test_the_whole_table(seed, dtype):
    """Normalised routers, products, numbers that come with the rows; inputs with a mean."""
    batch = Batch(seed, 33, sizes=(13, 16), k=40, dtype=dtype)
    batch.x_TK = batch.x_TK * 2 + 1
    for slot in range(3):
        specs = [random_spec(batch.rng, 40, ALL_SOURCES[1:], wide=True) for _ in batch.sizes]
        batch.fill(
            slot,
            [
                random_module(batch.rng, 40, n, spec)
                for n, spec in zip(batch.sizes, specs, strict=True)
            ],
        )
    batch.map(batch.slots_T)
    assert batch.error() < TOLERANCE[dtype]


@runs_kernels
def test_plain_adapters_with_factors_need_no_gate_table():
    batch = Batch(1, 30, sizes=(16,), slots=1)
    parts = [
        SlotPart([random_module(batch.rng, 24, 16, GateSpec(), 3)], 1.0, at) for at in range(12)
    ]
    batch.compose(0, parts)
    batch.map([0] * 30)
    assert batch.error() < TOLERANCE[torch.float32]
    gated_parts = [SlotPart([random_module(batch.rng, 24, 16, gated(2, 1))])] * 9
    with pytest.raises(ValueError, match="9 of 8"):
        batch.compose(0, gated_parts)


@runs_kernels
def test_a_given_weight_of_zero_keeps_an_expert_unread():
    batch = Batch(2, 20, sizes=(16,), slots=1)
    gate = GateSpec(source="request", blocks=(4, 4))
    module = random_module(batch.rng, 24, 16, gate)
    batch.compose(0, [SlotPart([module])])
    batch.rows_TC[:, 0] = 0
    batch.map([0] * 20)
    assert batch.error() < TOLERANCE[torch.float32]
    want_TN, b_NR = batch.run(), module.b_NR.clone()
    b_NR[:, :4] = NAN
    batch.site.write(0, [replace(module, b_NR=b_NR)])
    assert torch.equal(batch.run(), want_TN)


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
    assert batch.error(settled=False) < TOLERANCE[torch.float32]
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
    """y is wider than the slices; other columns and rows stay NaN."""
    batch = Batch(7, 9, sizes=(12,))
    batch.fill(0, [random_module(batch.rng, 24, 12, top_k(4, 3, 2))])
    batch.map([0, -1, 0, 1, 0, 0, -1, 0, 0])
    y_TN = torch.full((9, 30), float("nan"), device=DEVICE)
    y_TN[:, 5:17] = 1
    gated_lora_(y_TN[:, 5:], batch.x_TK, batch.number)
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
def test_routers_that_move_are_followed():
    """A larger router makes the buffer anew; kernels find it by the address in a table."""
    batch = Batch(10, 12, sizes=(16,), reserve=False)
    assert batch.site.router_SGK.shape[1] == 0
    batch.map([0, 1, 2] * 4)
    for slot, experts in enumerate((2, 4, 8)):
        batch.fill(slot, [random_module(batch.rng, 24, 16, top_k(experts, 2, 1))])
        assert batch.site.router_SGK.shape[1] == experts
        assert batch.error() < TOLERANCE[torch.float32]


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
@pytest.mark.parametrize("frozen", [None, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_sharded_input_is_summed_between_the_launches(seed, frozen):
    ranks, whole = Ranks(), Batch(seed, 18, sizes=(16,), slots=2)
    module = random_module(whole.rng, 24, 16, random_spec(whole.rng, sources=SOURCES[1:]))
    whole.fill(1, [module])
    shards = []
    for rank in range(2):
        k = slice(12 * rank, 12 * rank + 12)
        part = replace(
            module, a_RK=module.a_RK[:, k],
            router_GK=None if module.router_GK is None else module.router_GK[:, k],
            head_K=None if module.head_K is None else module.head_K[k],
        )  # fmt: skip
        shard = Batch(seed, 18, sizes=(16,), k=12, slots=2)
        shard.fill(1, [part])
        shard.site.reduce, shard.site.step.frozen = ranks.sum_, frozen
        shard.x_TK = whole.x_TK[:, k]
        shards.append(shard)
    y_TN = sum(ranks.run(lambda rank: shards[rank].run()))
    torch.testing.assert_close(y_TN.cpu(), whole.expected(), rtol=1e-4, atol=1e-5)
    width = shards[0].site.num_rows if frozen else shards[0].site.plans[1].num_inputs
    assert ranks.summed == [(18, width)]


@runs_kernels
@pytest.mark.parametrize("x_is_whole", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_half_of_a_and_b_on_each_rank(seed, x_is_whole):
    ranks, whole = Ranks(), Batch(seed, 18, sizes=(16,), slots=2)
    module = random_module(whole.rng, 24, 16, random_spec(whole.rng, sources=SOURCES))
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
        shard.site.reduce = ranks.sum_
        if x_is_whole:
            shard.site.x_part, shard.x_TK = k, whole.x_TK
        else:
            shard.site.y_part, shard.x_TK = n, whole.x_TK[:, k]
        shards.append(shard)

    def one(rank: int) -> torch.Tensor:
        y_TN = torch.zeros(18, 8 if x_is_whole else 16, device=DEVICE)
        gated_lora_(y_TN, shards[rank].x_TK, shards[rank].number)
        return y_TN

    parts = ranks.run(one)
    y_TN = torch.cat(parts, dim=1) if x_is_whole else sum(parts)
    torch.testing.assert_close(y_TN.cpu(), whole.expected(), rtol=1e-4, atol=1e-5)
    assert ranks.summed == [(18, shards[0].site.num_rows)]


@runs_kernels
def test_a_step_may_hold_more_rows_than_the_tensors():
    """An engine's dummy run leaves the map of the last step: rows past x are nobody's."""
    batch = Batch(12, 30, sizes=(16,)).fill_at_random()
    batch.map(np.arange(30) % 4)
    y_TN = torch.full((30, 16), NAN, device=DEVICE)
    y_TN[:7] = 0
    gated_lora_(y_TN[:7], batch.x_TK[:7], batch.number)
    torch.testing.assert_close(y_TN[:7].cpu(), batch.expected()[:7], rtol=1e-4, atol=1e-5)
    assert y_TN[7:].isnan().all()


@runs_kernels
def test_no_rows():
    batch = Batch(13, 0, sizes=(16,)).fill_at_random()
    assert batch.run().shape == (0, 16)
    batch.map([0, 1])
    assert batch.run().shape == (0, 16)


@runs_kernels
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_adapters_in_another_dtype_than_the_model(stored):
    batch = Batch(14, 20, sizes=(16,), k=40, dtype=stored)
    batch.fill_at_random(sources=("none", "router"))
    batch.x_TK = batch.x_TK.to(torch.bfloat16)
    y_TN = torch.zeros(20, 16, dtype=torch.bfloat16, device=DEVICE)
    gated_lora_(y_TN, batch.x_TK, batch.number)
    settled_T, want = batch.settled(), batch.expected()
    error = (y_TN.cpu().float() - want)[settled_T].norm() / want[settled_T].norm()
    assert error < TOLERANCE[torch.bfloat16]


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "rank", "routers"),
    [
        (torch.float32, 1, 1),
        (torch.bfloat16, 8, 8),
        (torch.float16, 12, 3),
        (torch.bfloat16, 64, 64),
    ],
)
def test_selfcheck_passes(dtype, rank, routers):
    assert selfcheck(DEVICE, dtype, rank, routers) is None


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nothing_in_the_selfcheck_hangs_on_rounding(rank, dtype):
    cases = checks.cases(rank, min(rank, 64))
    wanted = [checks.expected(case, dtype) for case in cases]
    torch.manual_seed(0)
    for slot in cases[0].slots:  # all cases have these
        for part in slot:
            if part is not None and part.router_GK is not None:
                part.router_GK.mul_(1 + 5e-5 * torch.randn(part.router_GK.shape))
            elif part is not None and part.gate.source == "self" and dtype is torch.float32:
                part.a_RK.mul_(1 + 1e-5 * torch.randn(part.a_RK.shape))
    for case, want in zip(cases, wanted, strict=True):
        error = (checks.expected(case, dtype) - want).norm() / want.norm()
        assert error < max(1e-4, TOLERANCE[dtype])


@runs_kernels
def test_selfcheck_says_what_is_wrong(monkeypatch):
    backend = choice.triton()
    right = backend.expand_

    def one_column_off(y_TN, u_PTR, site):
        right(y_TN, u_PTR, site)
        y_TN[:, 3] *= 1.5

    def refused(*_):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(backend, "expand_", one_column_off)
    assert "results differ" in selfcheck(DEVICE, torch.float32, 8, 8)
    monkeypatch.setattr(backend, "expand_", refused)
    assert selfcheck(DEVICE, torch.float32, 8, 8) == "RuntimeError: out of resource: shared memory"


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("t", [1, 8, 64, 300, 2048])
@pytest.mark.parametrize(("k", "sizes"), [(2560, (4096, 1024, 1024)), (4096, (2304, 2304))])
def test_sizes_of_real_models(k, sizes, t, dtype):
    batch = Batch(t, t, sizes=sizes, k=k, slots=4, max_rank=128, dtype=dtype)
    rank_wise = gated(64, 1, score="sigmoid", select="top_k", k=8, weight="renormalise")
    for slot, spec in enumerate((GateSpec(), top_k(8, 16, 2), rank_wise)):
        batch.fill(slot, [random_module(batch.rng, k, n, spec, rank=32) for n in sizes])
    assert batch.error() < TOLERANCE[dtype]
    assert torch.equal(batch.run(), batch.run())


@on_gpu
def test_offsets_beyond_32_bits():
    """y and B of more than 2^31 numbers; only the last row and the last slot are used."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    t, n, slots = 4200, 1 << 19, 17
    batch = Batch(0, t, sizes=(n,), k=32, slots=slots, max_rank=256, dtype=torch.bfloat16)
    batch.fill(slots - 1, [random_module(batch.rng, 32, n, top_k(4, 64, 2))])
    batch.map([-1] * (t - 1) + [slots - 1])
    y_TN = torch.zeros(t, n, dtype=torch.bfloat16, device=DEVICE)
    gated_lora_(y_TN, batch.x_TK, batch.number)
    batch.x_TK, batch.slots_T = batch.x_TK[-1:], batch.slots_T[-1:]
    got, want = y_TN[-1:].cpu().float(), batch.expected()
    assert (got - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]
    assert not y_TN[:-1].any()


@on_gpu
@pytest.mark.parametrize("t", [1, 8, 40, 200])
def test_a_captured_graph_follows_the_step_it_runs_in(t):
    """New rows, new slots and new adapters, none of which the graph was captured with."""
    batch = Batch(10, t, sizes=(64, 16), k=64).fill_at_random(sources=("router", "self", "none"))
    batch.map([0] * t)
    batch.run()
    y_TN, graph = torch.zeros(t, 80, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gated_lora_(y_TN, batch.x_TK, batch.number)
    x_TK = batch.x_TK
    for i, slots_T in enumerate(([1] * t, [3] * max(1, t // 4), np.arange(t) % 5 - 1, [-1] * t)):
        batch.map(slots_T)
        x_TK.copy_(torch.randn(x_TK.shape))
        if i == 2:
            batch.fill(0, [batch.module(n, sources=("router",)) for n in batch.sizes])
        y_TN.zero_()
        graph.replay()
        batch.slots_T = np.concatenate([slots_T, np.full(t - len(slots_T), -1)]).astype(int)
        got, want, settled_T = y_TN.cpu(), batch.expected(), batch.settled()
        torch.testing.assert_close(got[settled_T], want[settled_T], rtol=1e-3, atol=1e-4)
        assert not got[batch.slots_T < 0].any()


@on_gpu
def test_a_captured_graph_with_the_shrink_on_a_second_stream():
    batch = Batch(11, 24, sizes=(64,), k=64).fill_at_random(sources=("router", "none"))
    weight_NK = torch.randn(64, 64, device=DEVICE)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def layer():
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        y_TN = batch.x_TK @ weight_NK.t()
        with torch.cuda.stream(side):
            u_PTR = begin(batch.x_TK, batch.site)
        here.wait_stream(side)
        finish_(y_TN, batch.x_TK, u_PTR, batch.site)
        return y_TN

    layer()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y_TN = layer()
    batch.map(np.arange(24) % 5 - 1)
    graph.replay()
    want = batch.expected() + (batch.x_TK @ weight_NK.t()).cpu()
    settled_T = batch.settled()
    torch.testing.assert_close(y_TN.cpu()[settled_T], want[settled_T], rtol=1e-3, atol=1e-4)


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
