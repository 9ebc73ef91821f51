"""Formats without recorded numbers: a running engine against the transformers implementation."""

from __future__ import annotations

import pytest

from integration_tests.engines import lora, prompt_logprobs, worst
from integration_tests.reference_model import logits, steady_prompt
from tests import make_multi, make_routed
from vllm_lora_ext.adapters import load_adapter

BOUND = 1e-4
WRITERS = {
    "arrow": make_multi.write_arrow,
    "lora_mixer": make_multi.write_lora_mixer,
    "poly": make_multi.write_poly,
    "adamole": make_routed.write_adamole,
    "mole": make_routed.write_mole,
}

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("system", WRITERS)
def test_the_engine_agrees_with_transformers(system, llama, tmp_path):
    folder = WRITERS[system](tmp_path / system, 3)
    adapter = load_adapter(folder)
    prompt = steady_prompt("base_llama", adapter, 30, 1)
    wanted = [logits("base_llama", a, prompt) for a in (adapter, None)]
    assert (wanted[0] - wanted[1]).abs().max() > 0.05
    requests = [(prompt, lora(system, folder)), (prompt, None)]
    got = prompt_logprobs(llama, requests, wanted[0].shape[1])
    diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    print(f"{system}: max |dlogp| {diffs[0]:.1e}, base {diffs[1]:.1e}")
    assert max(diffs) < BOUND
