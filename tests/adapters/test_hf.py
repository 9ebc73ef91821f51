"""apply_adapter: hooks that come off, refusals, and the delta against the formula spelled out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from make_adapters import normal, random_adapter, random_module, random_spec, router_spec

from vllm_lora_ext.adapters import RoutedAdapter
from vllm_lora_ext.adapters.hf import apply_adapter, delta_reference
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

IDS = torch.arange(4, 40)[None]


def test_hooks_come_off(bases):
    model = bases["base_llama"]
    before = model(IDS).logits
    adapter = random_adapter(model.config, 0, router_spec())
    with apply_adapter(model, adapter):
        assert (model(IDS).logits - before).abs().mean() > 0.1
    assert torch.equal(model(IDS).logits, before)
    with pytest.raises(RuntimeError), apply_adapter(model, adapter):
        raise RuntimeError
    assert torch.equal(model(IDS).logits, before)


def test_refuses_what_the_model_lacks(bases):
    rng = np.random.default_rng(0)
    for name, code in (("model.layers.9.mlp.up_proj", "unknown_module"),
                       ("model.layers.0.mlp", "unknown_module"),
                       ("model.layers.0.mlp.up_proj", "shape_mismatch")):  # fmt: skip
        adapter = RoutedAdapter({name: random_module(rng, 8, 8, GateSpec())}, system="x")
        with pytest.raises(AdapterError, match=name.rsplit(".", 1)[1]) as caught:
            apply_adapter(bases["base_llama"], adapter)
        assert caught.value.code == code


@pytest.mark.parametrize("seed", range(6))
def test_routing_matters(seed, bases):
    """Random adapters move the logits enough that a wrong one cannot hide."""
    for model in bases.values():
        before = model(IDS).logits
        with apply_adapter(model, random_adapter(model.config, seed)):
            assert 0.2 < (model(IDS).logits - before).abs().mean() < 0.9


def test_delta_is_the_sum_over_experts():
    rng = np.random.default_rng(1)
    module, x = random_module(rng, 20, 12, router_spec(experts=5, rank=3, k=2)), normal(rng, 9, 20)
    p = torch.softmax(x @ module.router_GK.T, -1)
    top = torch.topk(p, 2)
    want = torch.zeros(9, 12)
    for t in range(9):
        for value, e in zip(top.values[t], top.indices[t].tolist(), strict=True):
            rows = slice(3 * e, 3 * e + 3)
            expert = module.b_NR[:, rows] @ (module.a_RK[rows] @ x[t])
            want[t] += value / top.values[t].sum() * expert
    torch.testing.assert_close(delta_reference(module, x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_equal_experts_behind_a_normalised_gate_are_one_expert(seed):
    rng = np.random.default_rng(seed)
    one = random_module(rng, 16, 10, GateSpec(), rank=2)
    spec = router_spec(experts=4, rank=2, k=int(rng.integers(1, 5)))
    many = type(one)(
        one.a_RK.repeat(4, 1), one.b_NR.repeat(1, 4), spec, router_GK=normal(rng, 4, 16)
    )
    x = normal(rng, 7, 16)
    torch.testing.assert_close(
        delta_reference(many, x), delta_reference(one, x), atol=1e-5, rtol=1e-5
    )


def test_random_specs_cover_the_whole_table():
    rng = np.random.default_rng(0)
    specs = [random_spec(rng, stable=False) for _ in range(600)]
    for field in ("source", "score", "select", "weight", "bias", "key", "threshold_head",
                  "subtract_threshold"):  # fmt: skip
        allowed = 2 if field in ("threshold_head", "subtract_threshold", "key") else None
        seen = {getattr(spec, field) for spec in specs}
        expected = {"source": 4, "score": 5, "select": 4, "weight": 4, "bias": 3}
        assert len(seen) == (allowed or expected[field]), field
    assert any(spec.mask_below is not None for spec in specs)
    assert any(len(set(spec.blocks)) > 1 for spec in specs)
    assert all(sum(spec.blocks) <= 40 and spec.router_rows <= 40 for spec in specs)
