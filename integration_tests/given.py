"""Requests that give an adapter's gates themselves: weights of a library, positions of an image;
and factors of experts that are whole blocks."""

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
from integration_tests.engines import lora, recorded
from integration_tests.reference_model import model, where, worn
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.cli import app
from vllm_lora_ext.conditions.column import Column, Prompt

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
    own, rng = lora("made-mmlora", folder), np.random.default_rng(8)
    mmlora, cases = load_adapter(folder), []
    for i, spans in enumerate(([[4, 19]], [[0, 9], [33, 70]], [])):
        prompt = rng.integers(4, 380, 24 + 50 * (i == 1)).tolist()
        shown = {"image": tuple((a, b) for a, b in spans)}
        says = {"modality_spans": {"image": spans}} if spans else {}
        cases.append(_followed(f"images {i}", prompt, [mmlora], shown, own, says))
    return cases


def experts() -> list[Case]:
    """MixLoRA's blocks: scaled, on spans of prompt and answer, and beside a plain adapter."""
    green = "spans-a-green"
    folders = {
        "mixlora-a": recorded("mixlora-a").folder,
        green: adapter("spans-a", "green").lora_path,
    }
    rng, cases = np.random.default_rng(12), []
    for i, parts in enumerate((
        [{"name": "mixlora-a", "scale": -0.5}],
        [{"name": "mixlora-a", "spans": [[3, 9], [12, 50]]}],
        [{"name": "mixlora-a", "scale": 1.5, "spans": [[20, None]]}, {"name": green, "scale": 2}],
        [{"name": "mixlora-a", "scale": 0.5}, {"name": green}],
    )):  # fmt: skip
        worn_there = [
            where(load_adapter(folders[p["name"]]), Column(p.get("scale", 1.0), _spans(p)))
            for p in parts
        ]
        prompt = rng.integers(4, 380, 30 + 40 * (i == 1)).tolist()
        says = {"adapters": parts}
        cases.append(_followed(f"experts {i}", prompt, worn_there, {}, None, says))
    return cases


def _spans(part: dict[str, Any]) -> tuple[tuple[int, int | None], ...] | None:
    return tuple((a, b) for a, b in part["spans"]) if "spans" in part else None


def _followed(
    key: str, prompt: list[int], adapters: list[RoutedAdapter], modality: Any, own: Any, says: Any
) -> Case:
    """A prompt and its greedy answer, by transformers."""
    net, ids, rows = model(BASE), list(prompt), []
    for _ in range(ANSWER):
        at = Prompt(len(ids), ids, modality)
        with torch.inference_mode(), ExitStack() as hooks:
            for one in adapters:
                hooks.enter_context(worn(net, one, at))
            rows.append(net(torch.tensor([ids])).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return Case(key, prompt, ids[len(prompt) :], torch.stack(rows), own, says)


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
