"""Requests that give an adapter's gates themselves: weights of a library, positions of an image."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from integration_tests.conditioned import Case, adapter, mixes
from integration_tests.engines import lora
from integration_tests.reference_model import model, worn
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.cli import app
from vllm_lora_ext.conditions.column import Prompt

BASE, ANSWER = "base_llama", 12
EXPERTS = ("red", "green", "blue")
LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def library(folder: Path) -> Any:
    """What requests for a library are sent with: the adapters of a fixture as one adapter."""
    named = [
        word for name in EXPERTS
        for word in ("--adapter", f"{name}={adapter('scales-a', name).lora_path}")
    ]  # fmt: skip
    made = CliRunner().invoke(app, ["bundle", *named, "--router", "request", "--out", str(folder)])
    assert made.exit_code == 0, made.output
    return lora("library", folder)


def gates(folder: Path) -> list[Case]:
    """Weights of a library's experts are scales of its adapters: the fixture's numbers."""
    own = library(folder)
    return [
        replace(case, key=f"gates {case.key}", adapter=own, says={"gates": {
            a["name"].removeprefix("scales-a-"): a["scale"] for a in case.says["adapters"]
        }})
        for case in mixes("scales-a")
    ]  # fmt: skip


def images(folder: Path) -> list[Case]:
    """A random MM-LoRA, with an image in the midst, with two, and without one."""
    _write_mmlora(folder)
    own, net, rng = lora("made-mmlora", folder), model(BASE), np.random.default_rng(8)
    mmlora, cases = load_adapter(folder), []
    for i, spans in enumerate(([[4, 19]], [[0, 9], [33, 70]], [])):
        prompt, rows = rng.integers(4, 380, 24 + 50 * (i == 1)).tolist(), []
        ids = list(prompt)
        for _ in range(ANSWER):
            where = Prompt(len(ids), ids, {"image": tuple((a, b) for a, b in spans)})
            with torch.inference_mode(), ExitStack() as hooks:
                hooks.enter_context(worn(net, mmlora, where))
                rows.append(net(torch.tensor([ids])).logits[0, -1])
            ids.append(int(rows[-1].argmax()))
        says = {"modality_spans": {"image": spans}} if spans else {}
        answer = ids[len(prompt) :]
        cases.append(Case(f"images {i}", prompt, answer, torch.stack(rows), own, says))
    return cases


def _write_mmlora(folder: Path) -> None:
    draw, tensors = torch.Generator().manual_seed(8), {}
    for name, layer in model(BASE).named_modules():
        if name.endswith(LAYERS):
            for letter, rank in (("V", 3), ("L", 5)):
                a_RK = torch.randn(rank, layer.in_features, generator=draw)
                b_NR = torch.randn(layer.out_features, rank, generator=draw)
                stem = f"{name}.{letter}_Slora_"
                tensors[f"{stem}A.weight"] = a_RK / layer.in_features**0.5
                tensors[f"{stem}B.weight"] = 0.2 * b_NR / rank**0.5
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {"system": "mmlora", "scaling_visual": 2, "scaling_language": 1}
    (folder / "routing.json").write_text(json.dumps(settings))
