"""Compiled code on a CPU: the ops are called when a row has an adapter, and only then."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tests.make_adapters import normal, random_module, router_spec
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gated_lora_,
    gated_lora_reference,
    register_site,
)

K, N = 20, 14


@pytest.fixture
def site():
    rng = np.random.default_rng(0)
    site = Site(2, K, (N,), 8, 8, torch.float32, "cpu")
    site.slots = [[random_module(rng, K, N, router_spec())] for _ in range(2)]
    for slot in range(2):
        site.write(slot, site.slots[slot])
    site.step = StepMap(8)
    return site


def test_a_compiled_layer_follows_its_step(site):
    number, rng = register_site(site), np.random.default_rng(1)
    weight_NK = normal(rng, N, K)

    def layer(x_TK: torch.Tensor) -> torch.Tensor:
        y_TN = x_TK @ weight_NK.t()
        gated_lora_(y_TN, x_TK, number)
        return torch.relu(y_TN)

    torch.compiler.reset()
    compiled = torch.compile(layer, dynamic=True)
    site.step.update(np.full(5, -1))  # traced while nothing has an adapter
    _, (code, *_) = run_and_get_code(compiled, normal(rng, 5, K))
    assert "torch.ops.vllm_lora_ext.active and torch.ops.vllm_lora_ext.gated_lora_" in code
    for slots in ([0, 1, -1, 1, 0], [-1, -1, -1], [1], [-1], [0, 0]):
        slots_T, x_TK = np.array(slots), normal(rng, len(slots), K)
        site.step.update(slots_T)
        delta = gated_lora_reference(x_TK, torch.tensor(slots_T), site.slots, (N,))
        want = torch.relu(x_TK @ weight_NK.t() + delta)
        torch.testing.assert_close(compiled(x_TK), want, rtol=1e-4, atol=1e-4)


def test_active_while_any_step_of_the_process_is():
    gc.collect()
    steps = [StepMap(4), StepMap(4)]
    seen = []
    for which, slot in ((0, 1), (1, -1), (1, 0), (0, -1), (1, -1)):
        steps[which].update(np.array([slot]))
        seen.append(torch.ops.vllm_lora_ext.active)
    assert seen == [True, True, True, True, False]
    steps[0].update(np.array([2]))
    del steps[:]
    gc.collect()
    assert torch.ops.vllm_lora_ext.active is False
