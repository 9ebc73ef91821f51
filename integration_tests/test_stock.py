"""With the plugin installed, plain adapters give stock vLLM's numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft_folders
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from integration_tests import forked
from integration_tests.engines import base_path, lora, prompt_logprobs, recorded, worst
from integration_tests.reference_model import logits, model
from integration_tests.stock_numbers import numbers
from tests.make_adapters import linear_shapes, normal
from vllm_lora_ext.adapters.registry import load_adapter


def peft_folder(folder: Path, shapes: dict, rank: int, seed: int, **config) -> Path:
    """A plain PEFT adapter with random weights."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (k, n) in shapes.items():
        kind = "embedding_" if name.endswith("embed_tokens") else ""
        end = "" if kind else ".weight"
        tensors[f"base_model.model.{name}.lora_{kind}A{end}"] = normal(rng, rank, k) / math.sqrt(k)
        tensors[f"base_model.model.{name}.lora_{kind}B{end}"] = normal(rng, n, rank) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "bias": "none",
              "target_modules": sorted({n.rpartition(".")[2] for n in shapes})}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The usual one, one with rsLoRA on few modules, one on embedding and output matrix."""
    root = tmp_path_factory.mktemp("plain")
    linears = linear_shapes(AutoConfig.from_pretrained(base_path("base_llama")))
    some = {n: s for n, s in linears.items() if n.endswith(("v_proj", "up_proj", "down_proj"))}
    ends = {"model.embed_tokens": (512, 128), "lm_head": (128, 512)}
    ends["model.layers.1.self_attn.q_proj"] = (128, 128)
    return [
        ("plain-a", str(recorded("plain-a").folder)),
        ("rslora", str(peft_folder(root / "rslora", some, 6, 1, use_rslora=True))),
        ("ends", str(peft_folder(root / "ends", ends, 5, 2))),
    ]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(4, 500, n).tolist() for n in (1, 9, 50)]


def test_plain_adapters_equal_stock(llama, adapters, prompts, tmp_path):
    job, out = tmp_path / "job.json", tmp_path / "out.pt"
    job.write_text(json.dumps({"base": "base_llama", "adapters": adapters, "prompts": prompts}))
    forked.run(
        [sys.executable, "-m", "integration_tests.stock_numbers", str(job), str(out)], tmp_path,
        os.environ | {"VLLM_LORA_EXT_DISABLE": "1"}, timeout=400,
    ).check_returncode()  # fmt: skip
    stock = torch.load(out, weights_only=True)
    ours = numbers(llama, adapters, prompts)
    for name, _ in adapters:
        diff = max(
            (a - b).abs().max().item() for a, b in zip(ours[name][0], stock[name][0], strict=True)
        )
        print(f"{name}: max |dlogp| from stock {diff:.1e}")
        assert diff < 1e-4
        assert ours[name][1] == stock[name][1]


def test_embedding_and_output_matrix_adapters_with_prompt_logprobs(llama, adapters, prompts):
    """prompt_logprobs asks for more rows than requests; each must get its own request's adapter."""
    folder = adapters[2][1]
    mine, adapter = lora("ends", folder), load_adapter(folder)
    requests = [(p, a) for p in prompts for a in (mine, None)]
    got = prompt_logprobs(llama, requests, 512)
    diffs = []
    for (prompt, who), rows in zip(requests, got, strict=True):
        diffs.append(worst(rows, logits("base_llama", adapter if who else None, prompt)))
    print(f"embedding and output matrix: max |dlogp| {max(diffs):.1e}")
    assert max(diffs) < 1e-4


def with_drafter(folder: Path) -> Path:
    """A layer more, of a drafter that the served model leaves out."""
    tensors = load_file(folder / peft_folders.WEIGHTS)
    draft = "base_model.model.mtp.layers.0.self_attn.q_proj.lora_"
    tensors |= {f"{draft}A.weight": torch.ones(8, 128), f"{draft}B.weight": torch.ones(128, 8)}
    save_file(tensors, folder / peft_folders.WEIGHTS)
    return folder


def with_value_head(folder: Path) -> Path:
    save_file({"v_head.summary.weight": torch.zeros(1, 128)}, folder / "value_head.safetensors")
    save_file({"model.norm.weight": torch.full((128,), 9.0)}, folder / "model.safetensors")
    return folder


@dataclasses.dataclass(frozen=True)
class Kind:
    """A folder as people have them.

    Args:
        change: what is done to what PEFT has saved; returns the folder that is served.
        lora: options of PEFT's.
        values: whether the change is one of the numbers, which PEFT then has as well.
    """

    change: Callable[[Path], Path] = lambda folder: folder
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    values: bool = False


def in_shards(folder: Path) -> Path:
    peft_folders.shard(folder)
    return folder


PATTERNS = {
    "target_modules": r".*\.[02]\..*(up|down|v)_proj",
    "rank_pattern": {r"(\w+\.)*mlp\.(?!down)\w+": 5},
    "alpha_pattern": {r".*[02].*up_proj": 40},
}
KINDS = {
    "other files": Kind(with_value_head),
    "shards": Kind(in_shards),
    "links": Kind(lambda folder: peft_folders.as_hub_cache(folder, folder.parent / "cache")),
    "float64": Kind(lambda folder: peft_folders.cast(folder, torch.float64), values=True),
    "float8": Kind(lambda folder: peft_folders.cast(folder, torch.float8_e4m3fn), values=True),
    "fan_in_fan_out": Kind(lambda folder: peft_folders.set_config(folder, fan_in_fan_out=True)),
    "patterns": Kind(lora=PATTERNS),
    "same values": Kind(lambda folder: peft_folders.set_config(folder, ("peft_type",), r=8.0)),
    "a drafter": Kind(with_drafter),
    "training": Kind(lora={"lora_dropout": 0.5, "init_lora_weights": "orthogonal"}),
    "neutral keys": Kind(lambda folder: peft_folders.set_config(folder, newer=None, other=False)),
    "an accepted key": Kind(lambda folder: peft_folders.set_config(folder, newest_option=16)),
    "a pickle": Kind(peft_folders.as_pickle),
}  # fmt: skip


def test_folders_as_people_have_them(llama_eager, tmp_path):
    """PEFT's own numbers for each, in one batch with base rows and a routed adapter."""
    net, prompt, routed = model("base_llama"), peft_folders.IDS[0].tolist(), recorded("hydralora-a")
    requests = [(prompt, None), (routed.prompts[1], lora(routed.name, routed.folder))]
    wanted = [logits("base_llama", None, prompt), routed.logits[1]]
    with torch.no_grad():
        for name, kind in KINDS.items():
            folder = tmp_path / name / "adapter"
            peft_folders.make(folder, net, **kind.lora)
            want = peft_folders.of_peft(folder, net)
            served = kind.change(folder)
            requests.append((prompt, lora(name, served)))
            wanted.append((peft_folders.of_peft(folder, net) if kind.values else want)[0])
    got = prompt_logprobs(llama_eager, requests, 512)
    diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    for name, diff in zip(("base", "routed", *KINDS), diffs, strict=True):
        print(f"{name}: max |dlogp| {diff:.1e}")
    assert max(diffs) < 2e-4
    moved = [(want - wanted[0]).abs().mean().item() for want in wanted[2:]]
    assert min(moved) > 0.005
