"""Reward models in DMoERM's layout, random, and what they say by the definition alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.memory import MemorySource, load_memory_adapter

TARGETS = ("q_proj", "v_proj")


def bare(config: Any, seed: int) -> Any:
    """A random model without a head, in float32."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return model


def make_reward_model(
    folder: Path, config: Any, points: Mapping[str, Sequence[str]], others: Sequence[str] = (),
    rank: int = 3, alpha: float = 6, middle: int = 20, slopes: int = 1, seed: int = 0,
) -> Path:  # fmt: skip
    """A folder of a random reward model.

    Args:
        points: category → its capabilities; others: categories without files, which come first.
        middle: width of the head; slopes: 1 or `middle`.
    """
    names, width = [*others, *points], config.hidden_size
    router = {f"model.{n}": t for n, t in bare(config, seed).state_dict().items()}
    router |= {"value_head.weight": 3 * torch.randn(len(names), width),
               "value_head.bias": torch.randn(len(names))}  # fmt: skip
    save(folder / "router" / "best_router.safetensors", router)
    for number, (category, own) in enumerate(points.items(), 1):
        wraps = "base_model." + "base_model.model." * len(own)
        tensors = {}
        for name, weights in bare(config, seed + number).state_dict().items():
            module, _, kind = name.rpartition(".")
            wrapped = module.endswith(TARGETS)
            tensors[f"{wraps}{module}{'.base_layer' if wrapped else ''}.{kind}"] = weights
            if not wrapped or kind != "weight":
                continue
            for point in own:
                a_RK = torch.randn(rank, weights.shape[1]) / weights.shape[1] ** 0.5
                tensors[f"{wraps}{module}.lora_A.{point}.weight"] = a_RK
                tensors[f"{wraps}{module}.lora_B.{point}.weight"] = torch.randn(len(weights), rank)
        tensors |= {
            "base_value_head.weight": torch.randn(1, width), "base_value_head.bias": torch.randn(1),
            "final_value_head1.weight": torch.randn(middle, len(own) * width) / width**0.5,
            "final_value_head1.bias": torch.randn(middle),
            "final_value_head2.weight": torch.randn(1, middle),
            "final_value_head2.bias": torch.randn(1), "prelu.weight": torch.rand(slopes),
        }  # fmt: skip
        save(folder / "innermoe" / category / "ckpts" / "phase3.safetensors", tensors)
    said = {
        "categories": names, "points": {c: list(p) for c, p in points.items()},
        "lora_alpha": alpha, "target_modules": list(TARGETS),
    }  # fmt: skip
    (folder / "routing.json").write_text(json.dumps(said))
    return folder


def add_tokenizer(base: Path) -> None:
    """One word per token, `t10` for 10, and the three marks of a reward model's texts: 5, 6, 7."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    marks = [f"<extra_{i}>" for i in range(3)]
    words = {f"t{i}": i for i in range(8, 80)} | {mark: 5 + i for i, mark in enumerate(marks)}
    tokenizer = Tokenizer(WordLevel(words | {"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", additional_special_tokens=marks
    ).save_pretrained(base)


def save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)


def hidden_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).last_hidden_state[0, -1]


def defined(
    folder: Path, base: Any, router_ids: Sequence[int], inner_ids: Sequence[int]
) -> tuple[list[float], float | None]:
    """Probabilities and reward of a text, from the files by the definition, without our reader.

    Args:
        base: a bare transformers model on which all experts stand.
    """
    said = json.loads((folder / "routing.json").read_text())
    router = load_file(folder / "router" / "best_router.safetensors")
    head = nn.Linear(router["value_head.weight"].shape[1], len(said["categories"]))
    head.load_state_dict({n: router.pop(f"value_head.{n}") for n in ("weight", "bias")})
    model = copy.deepcopy(base)
    model.load_state_dict({n.removeprefix("model."): t for n, t in router.items()})
    with torch.inference_mode():
        probs = head(hidden_of(model, router_ids)).softmax(-1)
    category = said["categories"][int(probs.argmax())]
    file = folder / "innermoe" / category / "ckpts" / "phase3.safetensors"
    if not file.exists():
        return probs.tolist(), None
    tensors = load_file(file)
    hidden = [
        expert_hidden(tensors, point, said["lora_alpha"], base, inner_ids)
        for point in said["points"][category]
    ]
    first = tensors["final_value_head1.weight"] @ torch.cat(hidden)
    first += tensors["final_value_head1.bias"]
    first = torch.where(first > 0, first, tensors["prelu.weight"] * first)
    reward = tensors["final_value_head2.weight"] @ first + tensors["final_value_head2.bias"]
    return probs.tolist(), float(reward)


def expert_hidden(
    tensors: Mapping[str, torch.Tensor], point: str, alpha: float, base: Any, ids: Sequence[int]
) -> torch.Tensor:
    """The last hidden state of the base with one expert added to it."""
    own = {}
    for name, weights in tensors.items():
        if f".lora_A.{point}." in name or f".lora_B.{point}." in name:
            module = name.rpartition("base_model.model.")[2].replace(f".{point}.", ".")
            own[f"base_model.model.{module}"] = weights
    rank = next(len(t) for n, t in own.items() if "lora_A" in n)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(TARGETS)}
    with apply_adapter(base, load_memory_adapter(MemorySource.of(own, config))):
        return hidden_of(base, ids)
