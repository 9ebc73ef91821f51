"""A and routers as rows below the base weight: one product and one launch against the reference.

Kernels run compiled where there is a GPU; without one `test_triton` runs this file in Triton's
interpreter.
"""

from __future__ import annotations

import pkgutil
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.test_triton import DEVICE, NAN, Batch, gated, on_gpu, runs_kernels, top_k
from tests.make_adapters import normal, random_module, random_spec
from tests.slot_parts import each, random_parts
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    extended_linear,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.extension import ALIGNED, MOST_ROWS, Extension, fits
from vllm_lora_ext.kernels.gated_lora.optional_selfcheck import selfcheck
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE
from vllm_lora_ext.routing import GateSpec, InputNorm, Rescale

SOURCES = ("none", "router", "self", "prototype")
DTYPES = (torch.float32, torch.bfloat16)


class Extended(Batch):
    """A batch whose site has an extension, its unused rows NaN, and a base layer with a bias."""

    def __init__(self, seed, t, sizes=(13, 7, 7), k=24, slots=4, max_rank=40, dtype=torch.float32):
        super().__init__(seed, t, sizes, k, slots, max_rank, dtype)
        n = sum(sizes)
        self.weight_NK = (normal(self.rng, n, k) / k**0.5).to(dtype).to(DEVICE)
        self.bias_N = normal(self.rng, n).to(dtype).to(DEVICE)
        self.site = Site(
            slots, k, sizes, max_rank, max_rank, dtype, DEVICE, choice.triton(),
            base_NK=self.weight_NK,
        )  # fmt: skip
        self.site.extension.weight_EK.fill_(NAN)
        self.site.extension.follow(self.weight_NK)
        self.site.store.b_SRN.fill_(NAN)
        self.site.store.tables.floats_SF.fill_(NAN)
        self.site.step = StepMap(max(t, 1) + 5, DEVICE, tiled=True)
        self.number = register_site(self.site)
        self.map(self.slots_T)

    def whole(self, bias=True):
        """The layer's output, with what the adapters add."""
        bias_N = self.bias_N if bias else None
        return extended_linear(self.x_TK, bias_N, self.number, sum(self.sizes)).cpu()

    def own(self, bias=True):
        """The base layer's output in fp32."""
        own_TN = self.x_TK.float() @ self.weight_NK.float().t()
        return (own_TN + (self.bias_N.float() if bias else 0)).cpu()

    def error(self, bias=True):
        """Of the whole output, and of base rows by themselves."""
        got_TN, want_TN = self.whole(bias).float(), self.own(bias) + self.expected()
        settled_T = self.settled()
        of_base_T = settled_T & torch.from_numpy(self.slots_T < 0)
        errors = [
            (got_TN - want_TN)[rows_T].norm() / want_TN[rows_T].norm()
            for rows_T in (settled_T, of_base_T) if rows_T.any()
        ]  # fmt: skip
        return max(map(float, errors))


def _plain_input(gate):
    return replace(gate, normalise="none", normalise_eps=GateSpec().normalise_eps)


def reads_x_itself(module):
    """A router may read a normalised x, but not here."""
    return replace(module, gate=_plain_input(module.gate), norm=None)


@pytest.fixture
def no_shrink(monkeypatch):
    """The two launches would give the right answer too."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton import backend

    def never(*_):
        raise AssertionError("a shrink was launched")

    monkeypatch.setattr(backend, "shrink", never)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(10))
def test_any_gates_in_mixed_batches(seed, dtype, no_shrink):
    t = (1, 5, 17, 33, MOST_ROWS)[seed % 5]
    batch = Extended(seed, t, dtype=dtype).fill_at_random(empty=(2,))
    assert batch.error(bias=seed % 2 == 0) < TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("e", "r", "k"), [(1, 1, 1), (8, 8, 2), (4, 12, 1), (28, 8, 2)])
def test_top_k_of_experts(e, r, k, dtype, no_shrink):
    batch = Extended(e * r + k, 21, sizes=(48,), k=72, slots=2, max_rank=224, dtype=dtype)
    for slot in range(2):
        batch.fill(slot, [random_module(batch.rng, 72, 48, top_k(e, r, k))])
    assert batch.error() < TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_several_adapters_in_a_slot(seed, no_shrink):
    sizes = tuple(np.random.default_rng(seed).integers(1, 40, 1 + seed % 3).tolist())
    batch = Extended(seed, 20, sizes=sizes, k=19 + seed)
    for slot in (0, 1, 3):
        parts = random_parts(batch.rng, batch.k, sizes, 40)
        batch.compose(slot, each(parts, reads_x_itself))
    batch.map(batch.slots_T)
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_products_biased_routers_and_numbers_that_come_with_rows(seed, no_shrink):
    """All of the table but routers that read a normalised x."""
    batch = Extended(seed, 33, sizes=(13, 16), k=40)
    for slot in range(3):
        specs = [random_spec(batch.rng, 40, SOURCES[1:], wide=True) for _ in batch.sizes]
        specs = [_plain_input(spec) for spec in specs]
        modules = [random_module(batch.rng, 40, n, spec)
                   for n, spec in zip(batch.sizes, specs, strict=True)]  # fmt: skip
        batch.fill(slot, modules)
    batch.map(batch.slots_T)
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_that_rescale_the_layers_output(dtype, no_shrink):
    batch = Extended(1, 20, sizes=(40, 7), dtype=dtype)
    batch.site.reserve_rescale()
    batch.site.rescale_S2N.fill_(NAN)

    def dora(n):
        module = random_module(batch.rng, 24, n, GateSpec())
        return replace(
            module, rescale=Rescale(normal(batch.rng, n) * 0.3 + 1, normal(batch.rng, n))
        )

    batch.fill(0, [dora(n) for n in batch.sizes])
    batch.fill(1, [random_module(batch.rng, 24, 40, top_k(4, 3, 2)), dora(7)])
    batch.map(batch.slots_T)
    own_TN = batch.own()
    want_TN = own_TN + gated_lora_reference(
        batch.x_TK.cpu(), torch.from_numpy(batch.slots_T), batch.slots, batch.sizes, y_TN=own_TN
    )
    got_TN = batch.whole().float()
    assert (got_TN - want_TN).norm() / want_TN.norm() < TOLERANCE[dtype]


@runs_kernels
def test_routers_are_not_rounded_to_the_models_dtype(no_shrink):
    """Two experts whose logits differ by less than bf16 holds: the choice is that of fp32."""
    batch = Extended(4, 64, sizes=(16,), k=64, slots=1, dtype=torch.bfloat16)
    batch.map([0] * 64)
    module = random_module(batch.rng, 64, 16, top_k(2, 4, 1))
    row_K = normal(batch.rng, 64)
    close = torch.stack([row_K, row_K + normal(batch.rng, 64) * 1e-3])
    batch.fill(0, [replace(module, router_GK=close)])
    assert batch.error() < TOLERANCE[torch.bfloat16]


@runs_kernels
def test_threshold_heads(no_shrink):
    batch = Extended(5, 30, sizes=(16,), k=40, slots=2, dtype=torch.bfloat16)
    spec = gated(4, 3, score="softmax", select="threshold", threshold=0.3, threshold_head=True)
    for slot in range(2):
        batch.fill(slot, [random_module(batch.rng, 40, 16, spec)])
    assert batch.error() < TOLERANCE[torch.bfloat16]


@runs_kernels
def test_base_steps_take_the_base_weight_as_it_is(no_shrink):
    batch = Extended(8, 20, dtype=torch.bfloat16).fill_at_random()
    batch.map([-1] * 20)
    want_TN = torch.nn.functional.linear(batch.x_TK, batch.weight_NK, batch.bias_N).cpu()
    assert torch.equal(batch.whole(), want_TN)


@runs_kernels
def test_large_steps_take_the_two_launches():
    batch = Extended(9, MOST_ROWS + 1, dtype=torch.bfloat16).fill_at_random()
    assert batch.error() < TOLERANCE[torch.bfloat16]


@runs_kernels
def test_a_slot_that_is_cleared_or_filled_anew(no_shrink):
    batch = Extended(9, 12).fill_at_random()
    batch.map([0] * 12)
    batch.site.clear(0)
    torch.testing.assert_close(batch.whole(), batch.own(), rtol=1e-4, atol=1e-5)
    batch.fill(0, [None, random_module(batch.rng, 24, 7, top_k(5, 3, 2)), None])
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
def test_rows_of_an_older_step_and_no_rows(no_shrink):
    batch = Extended(12, 30, sizes=(16,)).fill_at_random()
    batch.map(np.arange(30) % 4)
    y_TN = extended_linear(batch.x_TK[:7], batch.bias_N, batch.number, 16)
    want_TN = (batch.own() + batch.expected())[:7]
    torch.testing.assert_close(y_TN.cpu(), want_TN, rtol=1e-4, atol=1e-4)
    assert extended_linear(batch.x_TK[:0], None, batch.number, 16).shape == (0, 16)
    batch.map(np.arange(7) % 4)  # a graph of 30 rows runs a step of 7
    torch.testing.assert_close(batch.whole()[7:], batch.own()[7:], rtol=1e-4, atol=1e-4)


@runs_kernels
def test_who_listens_hears_y_and_x(no_shrink):
    batch, heard = Extended(3, 9).fill_at_random(), []
    batch.site.listen(lambda y, x, u: heard.append((y.clone(), x, u)))
    y_TN = batch.whole()
    ((heard_TN, x_TK, u),) = heard
    assert torch.equal(heard_TN.cpu(), y_TN) and x_TK.shape == batch.x_TK.shape and u is None


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), [("extended.expand_extended", (True, False)),
                                            ("glu.glu", (False, True))])  # fmt: skip
def test_the_selfcheck_passes_and_sees_what_is_wrong(name, kind, dtype, monkeypatch):
    backends = "vllm_lora_ext.kernels.gated_lora.backends.triton"
    assert selfcheck(DEVICE, dtype, 16, 8, *kind, False) is None
    right = pkgutil.resolve_name(f"{backends}.{name}")

    def off(y_TN, *args):
        right(y_TN, *args)
        y_TN[:, 3] *= 1.5

    monkeypatch.setattr(f"{backends}.{name}", off)
    assert "results differ" in selfcheck(DEVICE, dtype, 16, 8, *kind, False)


@runs_kernels
def test_both_at_once_pass_the_selfcheck():
    assert selfcheck(DEVICE, torch.bfloat16, 24, 3, True, True, False) is None


@runs_kernels
@pytest.mark.parametrize("case", ["8/2/8", "1/1/16"])
def test_the_benchmarks_layer_checks_before_it_times(case, monkeypatch):
    script = Path(__file__).resolve().parents[2] / "benchmarks/kernels/decoder_layer.py"
    layer = SimpleNamespace(**runpy.run_path(str(script)))
    step = StepMap(9, DEVICE, tiled=True)
    step.update(np.zeros(9, dtype=np.int64))
    made = layer.Layer("tiny", layer.Case.parse(case), "uniform", 9, step)
    weights = [normal(np.random.default_rng(0), sum(s), k).to(made.dtype).to(DEVICE)
               for k, s in layer.MODELS["tiny"]]  # fmt: skip
    assert made.extended(weights) is None
    made.extended(weights, share=1e6)()
    monkeypatch.setattr(Extension, "product", lambda self, x_TK: x_TK.new_ones(
        len(x_TK), self.rows, dtype=torch.float32))  # fmt: skip
    with pytest.raises(SystemExit, match="no times"):
        made.extended(weights, share=1e6)
    for fused in (True, False):
        made.gate_up(weights, fused)()


@on_gpu
def test_a_captured_graph_follows_the_step_it_runs_in():
    batch = Extended(10, 24, sizes=(64, 16), k=64, dtype=torch.bfloat16).fill_at_random()
    batch.whole()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TN = extended_linear(batch.x_TK, batch.bias_N, batch.number, 80)
    for slots_T in ([1] * 24, np.arange(24) % 5 - 1):
        batch.map(slots_T)
        batch.fill(0, [batch.module(n, sources=("router",)) for n in batch.sizes])
        graph.replay()
        want_TN, settled_T = batch.own() + batch.expected(), batch.settled()
        error = (y_TN.cpu().float() - want_TN)[settled_T].norm() / want_TN[settled_T].norm()
        assert error < TOLERANCE[torch.bfloat16]


# --- without a kernel -----------------------------------------------------------------------------


def site_of(dtype, slots=2, sizes=(256, 64), k=48, rank=16, routers=8):
    weight_NK = torch.randn(sum(sizes), k).to(dtype)
    site = Site(slots, k, sizes, rank, routers, dtype, "cpu", choice.triton(), base_NK=weight_NK)
    site.extension.follow(weight_NK)
    return site, weight_NK


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_router_is_kept_whole(dtype):
    """Three rows of bf16 add up to each number of fp32."""
    site, _ = site_of(dtype)
    router_GK = torch.randn(5, 48) * torch.logspace(-6, 3, 48)
    site.extension.put_routers(1, router_GK)
    parts_PGK = site.extension._routers_SPGK[1, :, :5].double()
    assert torch.equal(parts_PGK.sum(dim=0).float(), router_GK)


def test_the_base_layer_keeps_its_weight_in_front():
    site, weight_NK = site_of(torch.bfloat16)
    own = site.extension
    assert weight_NK.data_ptr() == own.weight_EK.data_ptr() and weight_NK.is_contiguous()
    assert own.rows == 320 + 2 * own.slot_rows and own.slot_rows % ALIGNED == 0
    assert site.a_SRK.untyped_storage().data_ptr() == own.weight_EK.data_ptr()
    address = weight_NK.data_ptr()
    weight_NK.data = torch.ones_like(weight_NK)  # weights that came later
    own.follow(weight_NK)
    assert weight_NK.data_ptr() == address and (own.base_NK == 1).all()
    assert own.product(torch.ones(3, 48, dtype=torch.bfloat16))[:, :320].eq(48).all()


def test_it_pays_where_slots_are_few_beside_the_layer():
    """Llama-3.1-8B: 8 experts of rank 16 on one slot, and plain adapters of rank 16 on four."""
    gate_up, o = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (28672, 4096))
    assert fits(gate_up, 1, 2, 128, 8) and fits(o, 1, 1, 128, 8)
    assert fits(gate_up, 4, 2, 16, 1) and not fits(o, 16, 1, 16, 1)
    assert not fits(o, 1, 1, 512, 8) and fits(o, 1, 1, 512, 8, share=0.2)
    assert not fits(o.to(torch.float16), 1, 1, 8, 1)


def test_a_router_that_reads_a_normalised_x_is_refused():
    site, _ = site_of(torch.float32)
    gate = replace(gated(2, 4, score="softmax"), normalise="layer")
    module = random_module(np.random.default_rng(0), 48, 256, gate)
    assert isinstance(module.norm, InputNorm)
    with pytest.raises(ValueError, match="below the weight"):
        site.pack([module, None])


def test_the_compiler_sees_a_new_tensor_and_no_size_of_a_step():
    site, _ = site_of(torch.bfloat16)
    handle = register_site(site)

    def layer(x, handle):
        return extended_linear(x, None, handle, 320)

    x_TK = torch.empty(5, 48, dtype=torch.bfloat16)
    traced = make_fx(layer, tracing_mode="fake")(x_TK, handle)
    assert "extended_linear" in traced.code and "empty" not in traced.code
