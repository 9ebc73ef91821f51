"""Heads and LoRA on experts in folders as PEFT writes them; the model's side is test_stock_lane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.cli import app
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.summary import summarise

PREFIX, EXPERTS, RANK = "base_model.model.model.layers.0.", 3, 2
Q_PROJ = {
    f"{PREFIX}self_attn.q_proj.lora_A.weight": torch.ones(RANK, 8),
    f"{PREFIX}self_attn.q_proj.lora_B.weight": torch.ones(8, RANK),
}
SCORE = {"base_model.model.score.weight": torch.ones(4, 8)}


def fused(where: str, width: int, out: int) -> dict[str, torch.Tensor]:
    q = EXPERTS * RANK
    return {
        f"{PREFIX}mlp.{where}.lora_A.weight": torch.ones(q, width),
        f"{PREFIX}mlp.{where}.lora_B.weight": torch.arange(float(out * q)).view(out, q),
    }


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6} | config
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


BOTH = fused("experts.base_layer", 8, 10) | fused("experts", 5, 8)


def test_parameters_are_told_by_their_wrappers_and_the_config(tmp_path: Path) -> None:
    """`.*down_proj` is how PEFT itself writes patterns of parameters."""
    pattern = {"alpha_pattern": {".*\\.down_proj": 4}}
    whole = load_adapter(folder(tmp_path / "both", BOTH, **pattern), parts=True).experts
    names = [f"model.layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")]
    assert list(whole) == names
    assert [(e.count, e.rank) for e in whole.values()] == [(EXPERTS, RANK)] * 2
    for name, where, scale in zip(names, ("experts.base_layer", "experts"), (3, 2), strict=True):
        want = BOTH[f"{PREFIX}mlp.{where}.lora_B.weight"] * scale
        torch.testing.assert_close(whole[name].b_NQ, want)
    for parameter in ("gate_up_proj", "down_proj"):
        one = folder(tmp_path / parameter, fused("experts", 8, 10),
                     target_parameters=[f"mlp.experts.{parameter}"])  # fmt: skip
        assert list(load_adapter(one, parts=True).experts) == [
            f"model.layers.0.mlp.experts.{parameter}"
        ]
    with pytest.raises(AdapterError, match="target_parameters") as caught:
        load_adapter(folder(tmp_path / "unsaid", fused("experts", 8, 10)), parts=True)
    assert caught.value.code == "unsupported_feature"


def test_heads_are_named_by_the_config(tmp_path: Path) -> None:
    saved = {"modules_to_save": ["classifier", "score"]}
    bias = {"base_model.model.score.bias": torch.ones(4)}
    good = folder(tmp_path / "good", Q_PROJ | SCORE | bias, **saved)
    head = load_adapter(good, parts=True).heads["score"]
    assert head.weight_NK.shape == (4, 8) and head.bias_N is not None
    other = {"base_model.model.classifier.weight": torch.ones(2, 8)}
    short = {"base_model.model.score.bias": torch.ones(3)}
    for name, tensors, config, code in (
        ("two", SCORE | other, saved, "duplicate_tensor"),
        ("short", SCORE | short, saved, "bad_shape"),
        ("lost", {}, saved, "missing_tensor"),
        ("half", bias, saved, "missing_tensor"),
        ("unsaid", SCORE, {}, "unexpected_tensor"),
        ("embedding", {}, {"modules_to_save": ["embed_tokens"]}, "unsupported_feature"),
        ("text", SCORE, {"modules_to_save": "score"}, "bad_value"),
    ):
        with pytest.raises(AdapterError) as caught:
            load_adapter(folder(tmp_path / name, Q_PROJ | tensors, **config), parts=True)
        assert caught.value.code == code, name


def test_tools_refuse_what_they_would_drop_and_inspect_shows_it(tmp_path: Path) -> None:
    made = folder(tmp_path / "all", Q_PROJ | SCORE | BOTH, modules_to_save=["score"])
    with pytest.raises(AdapterError, match="only a server holds"):
        load_adapter(made)
    command = ["convert", str(made), str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 1
    assert not (tmp_path / "out").exists()
    shown = CliRunner().invoke(app, ["inspect", str(made)])
    assert shown.exit_code == 0 and "trained head" in shown.output
    summary = summarise(load_adapter(made, parts=True))
    assert [p["name"] for p in summary["parts"]] == [
        "score", "model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj",
    ]  # fmt: skip
    assert "--max-lora-cls-labels 4" in summary["serve"]
