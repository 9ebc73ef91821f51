"""Requests that transformers answers, token by token: what no author has recorded.

Users and instructions among them: the authors' numbers (`test_templates`) are of another base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from integration_tests.conditioned import Case
from integration_tests.engines import lora
from integration_tests.reference_model import logits, model
from vllm_lora_ext.adapters import RoutedAdapter, load_adapter

BASE, HEAD, ANSWER = "base_llama", 32, 12
USERS, INSTRUCTION = ("reclora_ctr", "reclora_token"), "wavllm"
ATTENTION = ("q", "k", "v", "o")
MADE = (*USERS, INSTRUCTION)


def followed(
    name: str, prompt: list[int], adapter: RoutedAdapter | None, request: Any, says: Any = None
) -> Case:
    """A prompt and its greedy answer, by transformers.

    Args:
        adapter: what the request's adapter is, with all that the request says of it.
    """
    ids, rows = list(prompt), []
    for _ in range(ANSWER):
        rows.append(logits(BASE, adapter, ids)[-1])
        ids.append(int(rows[-1].argmax()))
    return Case(name, prompt, ids[len(prompt) :], torch.stack(rows), request, says or {})


def write_made(folder: Path) -> None:
    """Random adapters of BASE's attention that requests complete, in folders named as in `MADE`."""
    from tests.make_conditioned import write_random

    for seed, name in enumerate(MADE):
        write_random(name, folder / name, seed, BASE, ATTENTION)


def users(folder: Path) -> list[Case]:
    """Two of each of `USERS`, from what `write_made` has written."""
    rng, cases = np.random.default_rng(5), []
    for name in USERS:
        template = load_adapter(folder / name).template
        for i, prompt in enumerate(_prompts(rng)):
            user = [float(np.float32(x)) for x in rng.normal(size=template.user)]
            made = template.derive(torch.tensor(user), None)
            request = lora(f"made-{name}", folder / name)
            cases.append(followed(f"{name} {i}", prompt, made, request, {"user": user}))
    return cases


def instructions(folder: Path) -> list[Case]:
    """Two, from what `write_made` has written."""
    rng, cases = np.random.default_rng(6), []
    template = load_adapter(folder / INSTRUCTION, head_size=HEAD).template
    for i, prompt in enumerate(_prompts(rng)):
        ids = rng.integers(4, 380, 9 + 5 * i).tolist()
        made = instructed(model(BASE), template, ids)
        request = lora(f"made-{INSTRUCTION}", folder / INSTRUCTION)
        says = {"instruction": {"ids": ids}}
        cases.append(followed(f"{INSTRUCTION} {i}", prompt, made, request, says))
    return cases


def instructed(net: Any, template: Any, ids: list[int]) -> RoutedAdapter:
    """WavLLM's adapter for an instruction: from the base's states before its last norm."""
    hidden: list[torch.Tensor] = []
    inner = getattr(net, "model", net)
    norm = getattr(inner, "norm", None) or inner.final_layernorm
    hook = norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    with torch.inference_mode():
        net(torch.tensor([ids]))
        hook.remove()
        pooling = template.pooling()
        pooling.add(hidden[0])
        made: RoutedAdapter = template.derive(None, pooling.gate())
    return made


def _prompts(rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(4, 380, length).tolist() for length in (11, 40)]
