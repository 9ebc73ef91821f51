"""DoRA in a running engine: PEFT's numbers, in one batch with other adapters and the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from integration_tests.engines import base_path, lora, prompt_logprobs, worst
from integration_tests.reference_model import logits, model, steady_prompt
from tests import dora_folders
from tests.make_adapters import random_adapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.routing import GateSpec

BASE, VOCABULARY, BOUND = "base_qwen2", 384, 2e-3

pytestmark = pytest.mark.engine


def test_pefts_numbers_in_one_batch(qwen2: Any, tmp_path: Path) -> None:
    """Two DoRAs on a base with biases, a plain and a routed adapter, the base."""
    net, config = model(BASE), AutoConfig.from_pretrained(base_path(BASE))
    routed = random_adapter(config, 1)
    prompts = [steady_prompt(BASE, routed, n, n) for n in (5, 90)]  # the second in two chunks
    kinds: list[tuple[Any, Any]] = [(None, lambda p: logits(BASE, None, p))]
    for name, options in (("all", {}), ("some", {"target_modules": ["v_proj", "down_proj"],
                                                 "use_rslora": True})):  # fmt: skip
        tuned = dora_folders.make(tmp_path / name, net, **options)
        kinds.append((lora(f"dora-{name}", tmp_path / name), of(tuned)))
    for name, adapter in (("routed", routed), ("plain", random_adapter(config, 2, GateSpec()))):
        request = lora(f"beside-dora-{name}", write_native(adapter, tmp_path / name))
        kinds.append((request, lambda p, a=adapter: logits(BASE, a, p)))
    requests = [(p, who) for p in prompts for who, _ in kinds]
    wanted = [want(p) for p in prompts for _, want in kinds]
    for _ in range(2):  # the second time from the prefix cache
        got = prompt_logprobs(qwen2, requests, VOCABULARY)
        diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
        print(f"DoRA {max(diffs[1::5] + diffs[2::5]):.1e}, others {max(diffs):.1e}")
        assert max(diffs) < BOUND
    moved = [(w - wanted[0]).abs().mean().item() for w in wanted[1:3]]
    assert min(moved) > 0.02


def of(tuned: torch.nn.Module) -> Any:
    """PEFT's logits of a prompt."""

    def want(prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = tuned(torch.tensor([prompt])).logits[0]
        return found

    return want
