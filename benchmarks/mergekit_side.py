"""What merging_speed.py runs under mergekit's own interpreter: mergekit is called, not copied.

    MERGEKIT/bin/python mergekit_side.py JOB

JOB is JSON; `what` says which of the two functions below it is for. Prints JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.merge_methods import merge_tensors
from mergekit.scripts import extract_lora, run_yaml
from merging_ways import Clock, Memory, empty_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

Job = Mapping[str, Any]


def merge_linear(job: Job) -> dict[str, float]:
    """One linear, adapters in and an adapter out; seconds of every part."""
    ((name, (width, out)),) = job["shapes"].items()
    module = f"model.layers.0.{name}"
    clock = Clock()
    base_NK = load_file(job["base"])[f"{module}.weight"]
    clock.lap("read")
    tuned = [_tuned(base_NK, module, {name: (width, out)}, f) for f in job["folders"]]
    clock.lap("base")
    given = {"weight": job["weights"], **job["parameters"]}
    merged_NK = merge_tensors([base_NK, *tuned], job["method"], base_index=0, parameters=given)
    del tuned
    clock.lap("merge")
    # The two steps of mergekit-extract-lora; their other fields only tell where weights are.
    difference = extract_lora.TaskVectorTask.model_construct()
    split = extract_lora.TaskVectorDecompositionTask.model_construct(max_rank=job["rank"])
    a_RK, b_NR = split.execute(difference.execute(base_NK, merged_NK))
    clock.lap("extract")
    _save_adapter(Path(job["out"]), module, a_RK, b_NR)
    clock.lap("write")
    return clock.seconds


def _tuned(
    base_NK: torch.Tensor, module: str, shapes: dict[str, tuple[int, int]], folder: str
) -> torch.Tensor:
    """The base weight with an adapter merged in, by PEFT, as mergekit lets PEFT do it."""
    model = empty_model(shapes, 1)
    model.get_submodule(module).weight = torch.nn.Parameter(base_NK.clone(), requires_grad=False)
    tuned = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return tuned.get_submodule(module).weight.detach()


def _save_adapter(out: Path, module: str, a_RK: torch.Tensor, b_NR: torch.Tensor) -> None:
    rank = len(a_RK)
    out.mkdir(parents=True)
    tensors = {"lora_A": a_RK.contiguous(), "lora_B": b_NR.contiguous()}
    save_file(
        {f"base_model.model.{module}.{part}.weight": x for part, x in tensors.items()},
        out / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
              "target_modules": [module.rsplit(".", 1)[-1]]}  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config))


def merge_models(job: Job) -> dict[str, str]:
    """mergekit-yaml and mergekit-extract-lora on a small Llama, and `merge_linear`, per method."""
    root = Path(job["root"])
    base = small_llama(root / "base")
    for method, parameters in job["methods"].items():
        models = [
            {"model": f"{base}+{folder}", "parameters": {"weight": weight, **parameters}}
            for folder, weight in zip(job["folders"], job["weights"], strict=True)
        ]
        recipe = {"merge_method": method, "base_model": str(base), "dtype": "float32",
                  "models": models}  # fmt: skip
        (root / f"{method}.yaml").write_text(yaml.safe_dump(recipe))
        merged = root / f"{method}-merged"
        _command(run_yaml, root / f"{method}.yaml", merged, "--no-copy-tokenizer", "--quiet",
                 "--lora-merge-cache", root / "tuned")  # fmt: skip
        only = [word for name in job["shapes"] for word in ("--include-regex", name)]
        _command(extract_lora, "--model", merged, "--base-model", base, *only,
                 "--exclude-regex", "embed_tokens|lm_head", "--max-rank", job["rank"],
                 "--out-path", root / f"{method}-extracted")  # fmt: skip
        merge_linear({
            **job, "shapes": {job["linear"]: job["shapes"][job["linear"]]}, "method": method,
            "parameters": parameters, "base": base / "model.safetensors",
            "out": root / f"{method}-linear",
        })  # fmt: skip
    return {"version": importlib.metadata.version("mergekit"), "torch": torch.__version__}


def _command(script: Any, *words: object) -> None:
    script.main.main([str(word) for word in words], standalone_mode=False)


def small_llama(folder: Path) -> Path:
    """A random Llama of two layers in whose shapes merging_checks.SMALL fits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=20, vocab_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["what"] == "check":
        print(json.dumps(merge_models(job)))
        return
    memory = Memory()
    seconds = merge_linear(job)
    print(json.dumps({"seconds": seconds, **memory.peaks()}))


if __name__ == "__main__":
    main()
