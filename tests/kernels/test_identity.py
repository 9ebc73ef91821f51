"""Which layer this is, for compiled code: an input of the graph, never a number inside it."""

from __future__ import annotations

import gc
import secrets

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.make_adapters import normal, random_module, router_spec
from vllm_lora_ext.kernels.gated_lora import (
    EmbeddingSite,
    Site,
    StepMap,
    embedding_lora_,
    gated_lora_,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.mix_mlp import BlockSite, mix_act_, register_block

K, N, VOCAB = 20, 14, 11


class Layer(nn.Module):
    """An embedding, a linear and an activation with the ops, as the served layers call them."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.salt = 0
        self.weight_NK = nn.Parameter(normal(rng, N, K), requires_grad=False)
        self.table_VK = nn.Parameter(normal(rng, VOCAB, K), requires_grad=False)
        self.slots = [[random_module(rng, K, N, router_spec())]]
        self.step = StepMap(8)
        self.site = Site(1, K, (N,), 8, 8, torch.float32, "cpu")
        self.site.write(0, self.slots[0])
        self.site.step = self.step
        embedding = EmbeddingSite(torch.zeros(1, VOCAB, 4), torch.zeros(1, K, 4), self.step)
        block = BlockSite(self.site, Site(1, N, (K,), 8, 8, torch.float32, "cpu"), torch.relu)
        self.kept = embedding, block
        self.handles = [register_site(self.site), register_site(embedding), register_block(block)]

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        x_TK = self.table_VK[ids_T]
        embedding_lora_(x_TK, ids_T, self.handles[1])
        y_TN = x_TK @ self.weight_NK.t()
        gated_lora_(y_TN, x_TK, self.handles[0])
        a_TN = torch.relu(y_TN + self.salt)
        mix_act_(a_TN, y_TN, self.handles[2])
        return a_TN

    def check(self, run, slots: list[int]) -> None:
        """`run(ids)` against the reference, for rows of `slots`."""
        ids_T, slots_T = torch.arange(len(slots)) % VOCAB, np.array(slots)
        self.step.update(slots_T)
        x_TK = self.table_VK[ids_T]
        delta_TN = gated_lora_reference(x_TK, torch.tensor(slots_T), self.slots, (N,))
        want = torch.relu(x_TK @ self.weight_NK.t() + delta_TN + self.salt)
        torch.testing.assert_close(run(ids_T), want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def layers():
    rng = np.random.default_rng(0)
    return [Layer(rng) for _ in range(3)]


def test_equal_layers_have_one_graph(layers):
    """Dynamo's graph of each: equal text, and the handles among its inputs."""
    seen = []

    def backend(graph, inputs):
        seen.append((graph.code, sum(i.dtype is torch.int64 and i.dim() == 0 for i in inputs)))
        return graph.forward

    for layer in layers:
        torch.compiler.reset()
        layer.check(torch.compile(layer, backend=backend), [0, -1, 0])
    assert len(set(seen)) == 1
    assert seen[0][1] == 3


def test_equal_layers_share_one_compiled_piece(layers):
    salt = secrets.randbelow(1 << 30)  # in no cache of an earlier run
    counters.clear()
    for layer in layers:
        torch.compiler.reset()
        layer.salt = salt
        compiled = torch.compile(layer)
        layer.check(compiled, [0, -1, 0])
        layer.check(compiled, [-1, -1, -1])
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit")}
    assert found == {"miss": 1, "hit": 2}


def test_engines_in_one_process_are_independent(layers):
    """Code compiled for one engine serves another's layers, also when the first is gone."""
    first, *others = layers
    torch.compiler.reset()
    compiled = [torch.compile(layer) for layer in layers]
    for layer, run in zip(layers, compiled, strict=True):
        layer.check(run, [0, 0, -1])
        layer.check(run, [0, 0, -1])
    numbers = {int(h) for layer in layers for h in layer.handles[:2]}
    del first, layers[:], compiled[0], layer, run
    gc.collect()
    for layer, run in zip(others, compiled, strict=True):
        layer.check(run, [-1, 0, 0])
        layer.check(run, [-1, -1, -1])
    later = Layer(np.random.default_rng(1))
    assert not numbers & {int(h) for h in later.handles[:2]}


def test_a_handle_on_the_cpu_does_not_move_the_op_there():
    """y and x on a GPU and the handle on the CPU: the dispatcher takes the GPU's implementation."""
    keys = torch._C.DispatchKeySet
    for backend in ("CUDA", "Meta"):
        device = torch._C.DispatchKey.__members__[backend]
        assert (keys(device) | keys(torch._C.DispatchKey.CPU)).highestPriorityTypeId() == device
    y_TN = torch.zeros(2, N, device="meta")
    site = Site(1, K, (N,), 8, 8, torch.float32, "cpu")
    gated_lora_(y_TN, torch.zeros(2, K, device="meta"), register_site(site))


def test_a_narrow_default_dtype_and_device_change_nothing():
    """vLLM builds a model's layers under its own defaults."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            site = Site(2, K, (N,), 8, 8, torch.bfloat16, "cpu", choice.triton())
            handle = register_site(site)
    finally:
        torch.set_default_dtype(torch.float32)
    assert site.router_SGK.dtype is site.store.tables.floats_SF.dtype is torch.float32
    assert (handle.dtype, handle.device.type) == (torch.int64, "cpu")
