"""Random adapters over the whole gate table: a running engine against transformers."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from integration_tests.engines import base_path, lora, prompt_logprobs, worst
from integration_tests.reference_model import logits, steady_prompt
from tests.make_adapters import TARGETS, random_adapter
from vllm_lora_ext.adapters.readers.native import write_native

BOUND = 2e-3
LENGTHS = (3, 40, 90)  # the last is prefilled in two chunks
VOCABULARY = {"base_llama": 512, "base_qwen2": 384}


def _targets(seed: int) -> tuple[str, ...]:
    """All linears, or some: slices of a fused layer without an adapter must stay at the base."""
    return TARGETS if seed % 2 else tuple(t for i, t in enumerate(TARGETS) if (i + seed // 2) % 3)


@pytest.mark.parametrize(
    ("engine", "base", "first"),
    [("llama", "base_llama", 0), ("llama", "base_llama", 4), ("qwen2", "base_qwen2", 8)],
)
def test_random_gates_equal_transformers(request, engine, base, first, tmp_path):
    """Four adapters in one batch with base rows: other gates, ranks and targets per module."""
    llm = request.getfixturevalue(engine)
    config = AutoConfig.from_pretrained(base_path(base))
    requests, wanted, moved = [], [], []
    for seed in range(first, first + 4):
        adapter = random_adapter(config, seed, targets=_targets(seed), rank=6 + seed % 3)
        folder = write_native(adapter, tmp_path / f"{engine}-{seed}")
        for length in LENGTHS:
            prompt = steady_prompt(base, adapter, length, seed)
            requests += [(prompt, lora(folder.name, folder)), (prompt, None)]
            wanted += [logits(base, adapter, prompt), logits(base, None, prompt)]
            moved.append((wanted[-2] - wanted[-1]).abs().mean().item())
    got = prompt_logprobs(llm, requests, VOCABULARY[base])
    diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    print(f"{engine} {first}: routed {max(diffs[0::2]):.1e}, base {max(diffs[1::2]):.1e}, "
          f"mean |dlogit| of the adapters {min(moved):.2f}-{max(moved):.2f}")  # fmt: skip
    assert max(diffs) < BOUND
    assert min(moved) > 0.02
