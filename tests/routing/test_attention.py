"""Attention over earlier A x: the definition written out, number by number."""

from __future__ import annotations

import math

import numpy as np
import torch
from make_adapters import normal, random_module

from vllm_lora_ext.routing import GateSpec, attention_reference, delta_reference


def test_the_formula_written_out():
    rng = np.random.default_rng(0)
    tokens, rank, heads = 7, 6, 3
    z_TR, project_PR = normal(rng, tokens, rank), normal(rng, 3 * rank, rank)
    got_TR = attention_reference(z_TR, project_PR, heads)
    size = rank // heads
    for t in range(tokens):
        for h in range(heads):
            rows = slice(h * size, (h + 1) * size)
            q = project_PR[:rank][rows] @ z_TR[t]
            keys = [project_PR[rank : 2 * rank][rows] @ z_TR[s] for s in range(t + 1)]
            values = [project_PR[2 * rank :][rows] @ z_TR[s] for s in range(t + 1)]
            weights = [math.exp(float(q @ k) / math.sqrt(size)) for k in keys]
            want = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            torch.testing.assert_close(got_TR[t, rows], want, atol=1e-5, rtol=1e-5)


def test_what_a_layer_adds():
    module = random_module(np.random.default_rng(1), 16, 10, GateSpec("attention", blocks=(3, 3)))
    x_TK = torch.randn(9, 16)
    z_TR = x_TK @ module.a_RK.t()
    o_TR = attention_reference(z_TR, module.attention_PR, 2)
    torch.testing.assert_close(delta_reference(module, x_TK), (z_TR + o_TR) @ module.b_NR.t())
    assert torch.equal(delta_reference(module, x_TK[:4]), delta_reference(module, x_TK)[:4])
    assert o_TR.abs().mean() > 0.3 * z_TR.abs().mean()
