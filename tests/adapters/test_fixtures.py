"""The authors' own numbers: what their code gives for the fixtures, ours must give too."""

from __future__ import annotations

import json

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter

SYSTEMS = [
    "plain-a", "loramoe-a", "meteora-a", "smora-a", "flylora-a", "moram-a", "mola-a", "hydralora-a",
    "loramoe_moepeft-a", "mola_moepeft-a", "mixlora-a", "mixlora_moepeft-a",
]  # fmt: skip
TOLERANCE = 1e-3


def fixture(name):
    folder = FIXTURES / "routed" / name
    meta = json.loads((folder / "meta.json").read_text())
    return folder / "adapter", meta, load_file(folder / "expected.safetensors")


def system_of(meta):
    """MoE-PEFT writes MixLoRA as its authors' own package does."""
    return {"mixlora_moepeft": "mixlora"}.get(meta["system"], meta["system"])


def largest_error(model, adapter, expected):
    """Largest |logit - recorded| over all prompts and, where recorded, greedy steps."""
    worst = 0.0
    with apply_adapter(model, adapter):
        for i in range(4):
            prompt, greedy = expected[f"prompt_{i}"], expected[f"greedy_{i}"]
            logits = model(torch.cat([prompt, greedy])[None]).logits[0]
            steps = logits[len(prompt) - 1 : -1]  # row s chose greedy token s
            assert steps.argmax(-1).tolist() == greedy.tolist(), f"greedy tokens of prompt {i}"
            error = (logits[: len(prompt)] - expected[f"logits_{i}"]).abs().max().item()
            if f"greedy_logits_{i}" in expected:
                recorded = expected[f"greedy_logits_{i}"]
                error = max(error, (steps - recorded).abs().max().item())
            worst = max(worst, error)
    return worst


@pytest.mark.parametrize("name", SYSTEMS)
def test_reproduces_the_recorded_logits(name, bases):
    path, meta, expected = fixture(name)
    adapter = load_adapter(path)
    assert adapter.system == system_of(meta)
    assert adapter.rank == meta["total_rank"]
    assert adapter.base_model == meta["base"]
    error = largest_error(bases[meta["base"]], adapter, expected)
    print(f"{name}: largest |dlogit| {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("name", SYSTEMS)
def test_taking_the_adapter_off_leaves_the_base_model(name, bases):
    path, meta, expected = fixture(name)
    model = bases[meta["base"]]
    apply_adapter(model, load_adapter(path)).remove()
    logits = model(expected["prompt_1"][None]).logits[0]
    assert (logits - expected["base_logits_1"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", SYSTEMS)
def test_native_copy_gives_the_same_logits(name, bases, tmp_path):
    path, meta, expected = fixture(name)
    copy = load_adapter(write_native(load_adapter(path), tmp_path / "copy"))
    assert (copy.system, copy.base_model) == (system_of(meta), meta["base"])
    assert largest_error(bases[meta["base"]], copy, expected) < TOLERANCE
