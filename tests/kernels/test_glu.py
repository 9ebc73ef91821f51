"""The second launch that activates too, against the reference.

Compiled where there is a GPU; without one `test_triton` runs this file in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, linear, relu, silu

from tests.kernels.test_extension import Extended
from tests.kernels.test_triton import DEVICE, NAN, Batch, on_gpu, runs_kernels, top_k
from tests.make_adapters import normal, random_module
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    activated_lora,
    extended_linear,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.codes import ACTIVATIONS
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE
from vllm_lora_ext.routing import GateSpec, Rescale

ACTS = {
    "silu": silu, "gelu": gelu, "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "relu": relu,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def test_every_activation_is_here():
    assert set(ACTS) == set(ACTIVATIONS)


class Glu(Batch):
    """A batch whose layer is [gate | up], and its own output."""

    def __init__(self, seed, t, inner=20, act="silu", **options):
        super().__init__(seed, t, sizes=(inner, inner), **options)
        self.site.activation, self.inner = act, inner
        self.own_TN = normal(self.rng, t, 2 * inner).to(self.dtype).to(DEVICE)

    def activated(self):
        before = self.own_TN.clone()
        a_TI = activated_lora(self.own_TN, self.x_TK, self.number, self.inner)
        assert torch.equal(before, self.own_TN)
        return a_TI.float().cpu()

    def wanted(self):
        gate_TI, up_TI = (self.own_TN.float().cpu() + self.expected()).chunk(2, dim=1)
        return ACTS[self.site.activation](gate_TI) * up_TI

    def error(self):
        settled_T = self.settled()
        got_TI, want_TI = self.activated()[settled_T], self.wanted()[settled_T]
        return float((got_TI - want_TI).norm() / want_TI.norm())


@runs_kernels
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("seed", range(8))
def test_any_gates_in_mixed_batches(seed, dtype):
    t = (1, 5, 17, 33, 70, 600)[seed % 6]
    batch = Glu(seed, t, dtype=dtype).fill_at_random(empty=(2,))
    assert batch.error() < TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act):
    batch = Glu(3, 20, inner=33, act=act).fill_at_random()
    assert batch.error() < TOLERANCE[torch.float32]


@runs_kernels
@pytest.mark.parametrize("t", [1, 20, 70])
def test_a_step_of_the_base_model(t):
    batch = Glu(4, t, dtype=torch.bfloat16).fill_at_random()
    batch.map([-1] * t)
    gate_TI, up_TI = batch.own_TN.float().cpu().chunk(2, dim=1)
    want_TI = (silu(gate_TI) * up_TI).to(torch.bfloat16).float()
    torch.testing.assert_close(batch.activated(), want_TI, rtol=8e-3, atol=1e-3)


@runs_kernels
def test_one_slice_only_and_slots_that_rescale():
    batch = Glu(5, 24, slots=3)
    batch.site.reserve_rescale()
    batch.site.rescale_S2N.fill_(NAN)
    plain = random_module(batch.rng, 24, 20, GateSpec())
    dora = replace(plain, rescale=Rescale(normal(batch.rng, 20) * 0.3 + 1, normal(batch.rng, 20)))
    batch.fill(0, [None, random_module(batch.rng, 24, 20, top_k(4, 3, 2))])
    batch.fill(1, [plain, None])
    batch.fill(2, [plain, dora])
    batch.map(np.arange(24) % 4 - 1)
    own_TN = batch.own_TN.float().cpu()
    slots_T = torch.from_numpy(batch.slots_T)
    added_TN = gated_lora_reference(
        batch.x_TK.cpu(), slots_T, batch.slots, batch.sizes, y_TN=own_TN
    )
    gate_TI, up_TI = (own_TN + added_TN).chunk(2, dim=1)
    torch.testing.assert_close(batch.activated(), silu(gate_TI) * up_TI, rtol=1e-4, atol=1e-4)


@runs_kernels
def test_rows_of_an_older_step_and_no_rows():
    batch = Glu(6, 30).fill_at_random()
    batch.map(np.arange(30) % 4)
    want_TI = batch.wanted()
    a_TI = activated_lora(batch.own_TN[:7], batch.x_TK[:7], batch.number, batch.inner)
    torch.testing.assert_close(a_TI.cpu(), want_TI[:7], rtol=1e-4, atol=1e-4)
    assert activated_lora(batch.own_TN[:0], batch.x_TK[:0], batch.number, 20).shape == (0, 20)


class Both(Extended):
    """And with A and routers below the base weight."""

    def __init__(self, seed, t, inner=32, **options):
        super().__init__(seed, t, sizes=(inner, inner), **options)
        self.site.activation, self.inner = "silu", inner

    def error(self):
        settled_T, own_TN = self.settled(), self.own()
        got_TI = extended_linear(self.x_TK, self.bias_N, self.number, self.inner).float().cpu()
        gate_TI, up_TI = (own_TN + self.expected()).chunk(2, dim=1)
        want_TI = silu(gate_TI) * up_TI
        return float((got_TI - want_TI)[settled_T].norm() / want_TI[settled_T].norm())


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 9, 64, 65, 130])
def test_behind_an_extended_weight(t, dtype):
    """Steps too large for it take the weight as it is, a shrink, and the same launch."""
    batch = Both(t, t, dtype=dtype).fill_at_random(empty=(1,))
    assert batch.error() < TOLERANCE[dtype]
    batch.map([-1] * t)
    y_TN = linear(batch.x_TK, batch.weight_NK, batch.bias_N).float().cpu()
    got_TI = extended_linear(batch.x_TK, batch.bias_N, batch.number, batch.inner).float().cpu()
    want_TI = silu(y_TN[:, :32]) * y_TN[:, 32:]
    assert (got_TI - want_TI).norm() / want_TI.norm() < TOLERANCE[dtype]


@on_gpu
def test_a_captured_graph_follows_the_step_it_runs_in():
    batch = Glu(10, 24, inner=64, dtype=torch.bfloat16).fill_at_random()
    batch.activated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a_TI = activated_lora(batch.own_TN, batch.x_TK, batch.number, batch.inner)
    for slots_T in ([1] * 24, np.arange(24) % 5 - 1):
        batch.map(slots_T)
        batch.fill(0, [batch.module(n, sources=("router",)) for n in batch.sizes])
        graph.replay()
        want_TI, settled_T = batch.wanted(), batch.settled()
        error = (a_TI.cpu().float() - want_TI)[settled_T].norm() / want_TI[settled_T].norm()
        assert error < TOLERANCE[torch.bfloat16]


def test_the_compiler_sees_a_new_tensor():
    site = Site(2, 48, (64, 64), 16, 8, torch.bfloat16, "cpu", choice.triton())
    site.activation, handle = "silu", register_site(site)

    def layer(y_TN, x_TK, handle):
        return activated_lora(y_TN, x_TK, handle, 64)

    tensors = [torch.empty(5, n, dtype=torch.bfloat16) for n in (128, 48)]
    traced = make_fx(layer, tracing_mode="fake")(*tensors, handle)
    assert "activated_lora" in traced.code
