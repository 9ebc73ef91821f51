"""With the plugin installed, plain adapters give stock vLLM's numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from integration_tests.engines import base_path, lora, prompt_logprobs, recorded, worst
from integration_tests.reference_model import logits
from integration_tests.stock_numbers import numbers
from tests.make_adapters import linear_shapes, normal
from vllm_lora_ext.adapters.registry import load_adapter

REPO = Path(__file__).parent.parent


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
    subprocess.run(
        [sys.executable, "-m", "integration_tests.stock_numbers", str(job), str(out)],
        check=True, cwd=REPO, env=os.environ | {"VLLM_LORA_EXT_DISABLE": "1"}, timeout=400,
    )  # fmt: skip
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
