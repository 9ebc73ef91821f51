"""What people train is what is served: each system's training model, saved, read, the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gain_ratio
from train import SYSTEMS, Adapted

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip
LAYERS = range(1, 3)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_folder_serves_what_was_trained(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    ids = torch.randint(0, 64, (4, 9))
    plain = model(ids).logits
    adapted = Adapted(model, SYSTEMS[name], LAYERS)
    assert torch.equal(model(ids).logits, plain) or name == "mixlora"  # weights that sum to 1
    losses = _two_steps(adapted, model, ids)
    assert losses[-1] < losses[0]
    adapted.eval().save(tmp_path, "tiny")
    want = model(ids).logits.detach()
    assert (want - plain).abs().max() > 0.01

    adapter = load_adapter(tmp_path)
    assert adapter.system == name
    assert adapter.base_model == "tiny"
    with adapted.disable_adapter(), apply_adapter(model, adapter):
        got = model(ids).logits
    assert (got - want).abs().max() < 1e-5
    with adapted.disable_adapter():
        assert torch.equal(model(ids).logits, plain)


@torch.enable_grad()  # tests that serve in the same process turn it off
def _two_steps(adapted: Adapted, model: LlamaForCausalLM, ids: torch.Tensor) -> list[float]:
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0), []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        if len(losses) == 3:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_the_page_has_what_was_measured() -> None:
    """Every system that can be trained here, as served as in transformers but for a bfloat16."""
    report = json.loads(gain_ratio.RESULT.read_text(encoding="utf-8"))
    assert {row["system"] for row in report["rows"]} == set(gain_ratio.NAMES)
    page = gain_ratio.PAGE.read_text(encoding="utf-8")
    assert gain_ratio.with_table(page, report) == page, "gain_ratio.py --draw"
    assert all(row["gain_ratio"] > 0.9 for row in report["rows"])
