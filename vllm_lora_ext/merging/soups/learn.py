"""LoRA Soups' weights, learned from a few examples: one scalar per module and adapter.

    y = W x + sum_i p_i · s_i B_i A_i x        p = softmax over the adapters of the module's scalars

Prabhakar et al., "LoRA Soups" (https://arxiv.org/abs/2410.13025), "learnable concatenation" (CAT):
base model and adapters stay frozen, gradient descent on the completions' loss moves the scalars
alone. The authors start from random scalars; here all start at 0, the plain average.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_lora_ext.adapters import RoutedAdapter, RoutedModule, check_fits
from vllm_lora_ext.adapters.hf import model_shapes
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors
from vllm_lora_ext.merging.ops.scale import number
from vllm_lora_ext.merging.routed import one_base
from vllm_lora_ext.merging.soups.softmax import softmax_weights

Progress = Callable[[int, int, float], None]
_IGNORED = -100  # label of a token that counts for no loss


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, and of the completion that is to be learned."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Soup:
    """What was learned.

    Args:
        scalars: per adapter, module → scalar; `weights` is their softmax over the adapters.
        before, after: mean loss per token of all completions, at equal weights and now.
        losses: of every step's batch.
    """

    scalars: list[dict[str, float]] = field(repr=False)
    before: float
    after: float
    losses: list[float] = field(repr=False)

    @property
    def weights(self) -> list[dict[str, float]]:
        """Per adapter, module → p: what `merge("soups", ...)` takes as a term's weight."""
        return softmax_weights(self.scalars)


def learn_soups(
    model: nn.Module,
    adapters: Sequence[Factors],
    examples: Sequence[Example],
    steps: int = 50,
    rate: float = 0.1,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Soup:
    """Learn how much of each adapter every module should take.

    Args:
        model: a causal language model of transformers. It stays as it is; its weights need no
            gradients.
        adapters: two or more, of that model. A module's softmax runs over those that adapt it.
        steps: of Adam, each on `batch` examples; every example once before any comes again.
        rate: Adam's learning rate, in units of the scalars.
        seed: of the examples' order. The same call gives the same weights.
        progress: called with (steps done, steps, the step's loss).
    Raises:
        AdapterError: `bad_value`, `setting_mismatch` (base models), `unknown_module`,
            `shape_mismatch` (an adapter does not fit the model), `not_finite` (a loss).
    """
    _check(adapters, examples, steps, rate, batch)
    for adapter in adapters:
        check_fits(_routed(adapter), model_shapes(model), torch.float32)
    device = next(model.parameters()).device
    mixes = _mixes(adapters, device)
    scalars = [mix.scalar_I for mix in mixes.values()]
    optimizer = torch.optim.Adam(scalars, lr=rate)
    order, losses = _batches(examples, batch, seed), []
    with _mixed(model, mixes):
        before = _mean_loss(model, examples, batch)
        for done in range(1, steps + 1):
            loss, tokens = _loss(model, next(order))
            loss = loss / tokens
            # Of the scalars alone, whether or not the model's weights ask for gradients.
            gradients = torch.autograd.grad(loss, scalars, allow_unused=True)
            for scalar_I, gradient_I in zip(scalars, gradients, strict=True):
                scalar_I.grad = gradient_I
            optimizer.step()
            losses.append(_finite(loss.item(), f"the loss of step {done}"))
            if progress:
                progress(done, steps, losses[-1])
        after = _mean_loss(model, examples, batch)
    found: list[dict[str, float]] = [{} for _ in adapters]
    for name, mix in mixes.items():
        for i, value in zip(mix.adapters, mix.scalar_I.tolist(), strict=True):
            found[i][name] = value
    return Soup(found, before, after, losses)


@dataclass
class _Mix:
    """One module: the adapters that have it, their factors side by side, their scalars."""

    adapters: list[int]
    a_RK: torch.Tensor
    b_NR: torch.Tensor
    rank_I: torch.Tensor
    scalar_I: torch.Tensor

    def delta(self, x_TK: torch.Tensor) -> torch.Tensor:
        p_R = self.scalar_I.softmax(0).repeat_interleave(self.rank_I)
        return ((x_TK @ self.a_RK.T) * p_R) @ self.b_NR.T


def _mixes(adapters: Sequence[Factors], device: torch.device) -> dict[str, _Mix]:
    found = {}
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        having = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
        pairs = [adapters[i].modules[name] for i in having]
        found[name] = _Mix(
            having,
            torch.cat([pair.a_RK for pair in pairs]).float().to(device),
            torch.cat([pair.b_NR for pair in pairs], dim=1).float().to(device),
            torch.tensor([pair.rank for pair in pairs], device=device),
            torch.zeros(len(having), device=device, requires_grad=True),
        )
    return found


@contextmanager
def _mixed(model: nn.Module, mixes: Mapping[str, _Mix]) -> Iterator[None]:
    """The model with the adapters' weighted sum on top of its layers, and without dropout."""

    def hook(mix: _Mix) -> Any:
        return lambda layer, args, y: (y.float() + mix.delta(args[0].float())).to(y.dtype)

    modes = {module: module.training for module in model.modules()}
    model.eval()
    handles = [
        model.get_submodule(name).register_forward_hook(hook(mix)) for name, mix in mixes.items()
    ]
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()


def _loss(model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, int]:
    """Summed cross entropy of the completions' tokens, and how many they are."""
    rows = [[*e.prompt, *e.completion] for e in examples]
    width = max(map(len, rows))
    device = next(model.parameters()).device

    def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*r, *[value] * (width - len(r))] for r in rows], device=device)

    ids_BL = padded(rows, 0)
    seen_BL = padded([[1] * len(row) for row in rows], 0)
    labels_BL = padded([[_IGNORED] * len(e.prompt) + e.completion for e in examples], _IGNORED)
    logits_BLV = model(input_ids=ids_BL, attention_mask=seen_BL, use_cache=False).logits
    wanted_BL = labels_BL[:, 1:] != _IGNORED
    logits_NV = logits_BLV[:, :-1][wanted_BL].float()
    target_N = labels_BL[:, 1:][wanted_BL]
    return F.cross_entropy(logits_NV, target_N, reduction="sum"), len(target_N)


def _mean_loss(model: nn.Module, examples: Sequence[Example], batch: int) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(examples), batch):
            loss, count = _loss(model, examples[i : i + batch])
            total, tokens = total + loss.item(), tokens + count
    return _finite(total / tokens, "the loss of the examples")


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    draw = random.Random(seed)
    left: list[Example] = []
    while True:
        while len(left) < min(size, len(examples)):
            left += draw.sample(examples, len(examples))
        yield left[:size]
        left = left[size:]


def _check(
    adapters: Sequence[Factors], examples: Sequence[Example], steps: int, rate: float, batch: int
) -> None:
    if len(adapters) < 2:
        raise AdapterError(
            "bad_value", "there is nothing to weigh", seen=len(adapters),
            limit="two adapters or more", fix="name more of them",
        )  # fmt: skip
    one_base(adapter.base_model for adapter in adapters)
    if not examples:
        raise AdapterError(
            "bad_value", "there is no example to learn from", limit="one or more",
            fix="add examples",
        )  # fmt: skip
    for example in examples:
        if not example.prompt or not example.completion:
            raise AdapterError(
                "bad_value", "an example has no prompt or no completion",
                seen=[len(example.prompt), len(example.completion)],
                limit="one token or more of each", fix="remove the example",
            )  # fmt: skip
    for what, value in (("steps", steps), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise AdapterError("bad_value", f"{what} is out of range", seen=value, limit=">= 1")
    if number(rate, "rate") <= 0:
        raise AdapterError("bad_value", "rate is out of range", seen=rate, limit="> 0")


def _routed(adapter: Factors) -> RoutedAdapter:
    modules = {name: RoutedModule(pair.a_RK, pair.b_NR) for name, pair in adapter.modules.items()}
    return RoutedAdapter(modules, "plain", adapter.base_model, adapter.source)


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise AdapterError(
            "not_finite", f"{what} is NaN or infinite", seen=str(value),
            fix="check the adapters and the examples, or learn at a lower rate",
        )  # fmt: skip
    return value
