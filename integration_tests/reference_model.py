"""The transformers side of the comparisons: fp32 logits, and prompts on which they are stable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from integration_tests.engines import base_path
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.conditions.column import Column, Prompt, values
from vllm_lora_ext.routing import GateSpec


@cache
def model(base: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_path(base), dtype=torch.float32).eval()


def logits(base: str, adapter: RoutedAdapter | None, prompt: list[int], noise: float = 0.0) -> Any:
    """[T, V] fp32; `noise` scales the embeddings' relative disturbance."""
    net = model(base)
    applied = nullcontext() if adapter is None else apply_adapter(net, adapter)
    with torch.inference_mode(), applied:
        x = net.get_input_embeddings()(torch.tensor([prompt]))
        if noise:
            x = x * (1 + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        return net(inputs_embeds=x).logits[0]


def steady_prompt(base: str, adapter: RoutedAdapter, length: int, seed: int) -> list[int]:
    """A random prompt whose logits do not hang on a routing tie.

    Where two gates lie within rounding of each other, two correct implementations may choose
    differently; such a prompt cannot tell a right engine from a wrong one.
    """
    rng = np.random.default_rng(seed)
    for _ in range(40):
        prompt = rng.integers(4, 380, length).tolist()
        quiet, noisy = (logits(base, adapter, prompt, noise) for noise in (0.0, 3e-6))
        if (quiet - noisy).abs().max() < 5e-4:
            return prompt
    raise AssertionError("every prompt sits on a routing tie")


def scaled(adapter: RoutedAdapter, factor: float) -> RoutedAdapter:
    """All that it adds, times a number."""
    modules = {n: replace(m, b_NR=m.b_NR * factor) for n, m in adapter.modules.items()}
    return replace(adapter, modules=modules)


def where(adapter: RoutedAdapter, column: Column) -> RoutedAdapter:
    """A plain adapter that is multiplied by a column's number at each token."""
    modules = {
        n: replace(m, gate=GateSpec("position", blocks=(m.rank,)))
        for n, m in adapter.modules.items()
    }
    return replace(adapter, modules=modules, columns=(column,))


@contextmanager
def worn(net: Any, adapter: RoutedAdapter, prompt: Prompt) -> Iterator[None]:
    """An adapter's hooks on a transformers model, for one call with this prompt. What experts that
    are MLP blocks change of them is multiplied by the adapter's first column."""
    if not adapter.columns:
        with apply_adapter(net, adapter):
            yield
        return
    rows_TC = torch.from_numpy(values(adapter.columns, prompt, 0, prompt.length))
    base: dict[Any, torch.Tensor] = {}

    def keep(mlp: Any, _: Any, y: torch.Tensor) -> None:
        base[mlp] = y

    def multiply(mlp: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
        return base[mlp] + rows_TC[:, :1] * (y - base[mlp])

    blocks = [net.get_submodule(name) for name in adapter.blocks]
    hooks = [mlp.register_forward_hook(keep) for mlp in blocks]
    try:
        with apply_adapter(net, adapter, rows_TC):
            hooks += [mlp.register_forward_hook(multiply) for mlp in blocks]
            yield
    finally:
        for hook in hooks:
            hook.remove()
