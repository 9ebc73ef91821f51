"""One adapter, computed several ways: transformers, its native copy, and a vLLM engine.

transformers with `adapters.hf.apply_adapter`, in float32, is the yardstick.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters import RoutedAdapter, load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.limits import RANKS, slot_rank
from vllm_lora_ext.conditions.column import Prompt, values
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.settings import LoraExtSettings

# Largest |difference of a log-probability| that rounding explains, by the engine's dtype.
TOLERANCES = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
LENGTHS = (5, 17, 33, 64)  # of random prompts
# Of larger vocabularies an engine reports the likeliest tokens of a position only.
_WHOLE_VOCABULARY, _LIKELIEST = 4096, 20
NEW_TOKENS = 8
_NOISE, _STEADY, _TRIES = 3e-6, 5e-4, 40

Step = Callable[[str], None]
# Per position, token → log-probability; and the tokens that the engine went on with.
Answer = tuple[list[dict[int, float]], list[int]]


@dataclass(frozen=True)
class Comparison:
    """One way of computing against transformers.

    Args:
        what: which way.
        largest: largest |difference| of a log-probability, over `values` of them.
        greedy: share of positions, in the prompt and after it, with the same likeliest token.
    """

    what: str
    largest: float
    greedy: float
    values: int


@dataclass(frozen=True)
class Distance:
    """An approximation against the adapter that it stands for, over the same tokens.

    Args:
        largest, mean: |difference| of a log-probability, after each of the tokens behind prompts.
        effect: mean |difference| that the adapter makes there; greedy: share of these positions
            with the same likeliest token.
    """

    what: str
    largest: float
    mean: float
    effect: float
    greedy: float
    positions: int


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Args:
        positions: prompt positions that were compared.
        effect: mean |log-probability with the adapter - without|; 0 would verify nothing.
        distance: what X-LoRA's gates would be off, were they frozen. No part of what is verified.
    """

    adapter: str
    system: str
    base: str
    dtype: str
    tolerance: float
    prompts: int
    positions: int
    effect: float
    comparisons: list[Comparison] = field(default_factory=list)
    distance: Distance | None = None

    @property
    def largest(self) -> float:
        return max(comparison.largest for comparison in self.comparisons)

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance  # false for NaN

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "largest": self.largest, **asdict(self)}


@dataclass(frozen=True)
class Sequence:
    """A prompt and its greedy continuation, with what predicts each token.

    Args:
        prompt: T token ids.
        greedy: `NEW_TOKENS` ids that follow it, the likeliest each time.
        logp_PV: float32 log-probabilities after each of the P = T + NEW_TOKENS - 1 positions.
    """

    prompt: list[int]
    greedy: list[int]
    logp_PV: torch.Tensor


def load_base(name: str | os.PathLike[str]) -> Any:
    """The base model in float32. Raises AdapterError `not_found`, transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise AdapterError(
            "not_found", f"transformers cannot load the base model: {first}",
            seen=os.fspath(name), fix="name a folder with a model, or a model of the hub",
        ) from error  # fmt: skip


def random_prompts(model: Any, adapter: RoutedAdapter) -> list[list[int]]:
    """Prompts of random tokens, one of each of `LENGTHS`, on which no gate is undecided.

    Where two gates lie within rounding of each other, two correct implementations may choose
    differently; such a prompt cannot tell a right engine from a wrong one. Where none of 40 tries
    is steady the last one stays.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    prompts = []
    with _everywhere(model, adapter):
        for length in LENGTHS:
            size = (max(1, min(length, room - NEW_TOKENS)),)
            for _ in range(_TRIES):
                ids_T = torch.randint(4, vocabulary, size, generator=generator)
                _invoke(adapter, ids_T)
                with _by_column(model, adapter, ids_T.tolist(), len(ids_T)):
                    noisy, quiet = _logits(model, ids_T, _NOISE), _logits(model, ids_T)
                if (noisy - quiet).abs().max() < _STEADY:
                    break
            prompts.append(ids_T.tolist())
    return prompts


def follow(
    model: Any,
    adapter: RoutedAdapter | None,
    prompts: list[list[int]],
    step: Step = lambda text: None,
) -> list[Sequence]:
    """What transformers computes, with an adapter or without, in float32; a step per prompt."""
    found = []
    with _everywhere(model, adapter):
        for number, prompt in enumerate(prompts, 1):
            name = "base" if adapter is None else adapter.system
            step(f"transformers, {name}: prompt {number} of {len(prompts)}")
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                with _by_column(model, adapter, prompt, len(ids)):
                    logits_PV = _logits(model, torch.tensor(ids))
                ids.append(int(logits_PV[-1].argmax()))
            found.append(Sequence(prompt, ids[len(prompt) :], logits_PV.log_softmax(-1)))
    return found


def compare(what: str, wanted: list[Sequence], got: list[Answer]) -> Comparison:
    """An engine's numbers against transformers'.

    Where the engine chose another token its later positions answer another text: they count as
    disagreeing, and their numbers are left out.
    """
    largest, agreed, positions, values = 0.0, 0, 0, 0
    for sequence, (rows, tokens) in zip(wanted, got, strict=True):
        same = next((i for i, t in enumerate(tokens) if t != sequence.greedy[i]), NEW_TOKENS - 1)
        comparable = len(sequence.prompt) + same
        positions += len(sequence.logp_PV)
        for logp_V, row in zip(sequence.logp_PV[:comparable], rows, strict=False):
            ids = torch.tensor(list(row))
            diff = (logp_V[ids] - torch.tensor(list(row.values()))).abs().max().item()
            largest = max(largest, diff if diff == diff else float("inf"))
            agreed += int(logp_V.argmax()) == max(row, key=row.__getitem__)
            values += len(row)
    return Comparison(what, largest, agreed / positions, values)


def compare_copy(
    model: Any, adapter: RoutedAdapter, wanted: list[Sequence], step: Step = lambda text: None
) -> Comparison:
    """The adapter written in the native format and read again, in transformers."""
    with tempfile.TemporaryDirectory(prefix="vllm-lora-ext-") as scratch:
        copy = load_adapter(write_native(adapter, Path(scratch) / "native"))
    again = follow(model, copy, [sequence.prompt for sequence in wanted], step)
    diffs = [(a.logp_PV - b.logp_PV).abs().max().item() for a, b in zip(wanted, again, strict=True)]
    same = [
        (a.logp_PV.argmax(-1) == b.logp_PV.argmax(-1)).float().mean().item()
        for a, b in zip(wanted, again, strict=True)
    ]
    values = sum(sequence.logp_PV.numel() for sequence in wanted)
    return Comparison("native copy, transformers", max(diffs), sum(same) / len(same), values)


def frozen_distance(
    model: Any, adapter: RoutedAdapter, prompts: list[list[int]], step: Step = lambda text: None
) -> Distance | None:
    """How far gates that are frozen where a prompt ends are from the exact ones; None where the
    adapter has none that could be frozen."""
    if adapter.classifier is None:
        return None
    exact, frozen = (
        replace(adapter, classifier=replace(adapter.classifier, frozen=frozen))
        for frozen in (False, True)
    )
    diffs, effects, same = [], [], []
    for number, sequence in enumerate(follow(model, exact, prompts, step), 1):
        step(f"transformers, frozen gates: prompt {number} of {len(prompts)}")
        ids, end = sequence.prompt + sequence.greedy[:-1], len(sequence.prompt)
        with apply_adapter(model, frozen, prompt_length=end):
            got_PV = _logits(model, torch.tensor(ids)).log_softmax(-1)[end:]
        base_PV = _logits(model, torch.tensor(ids)).log_softmax(-1)[end:]
        want_PV = sequence.logp_PV[end:]
        diffs.append((got_PV - want_PV).abs())
        effects.append((base_PV - want_PV).abs())
        same.append((got_PV.argmax(-1) == want_PV.argmax(-1)).float())
    every_PV = torch.cat(diffs)
    return Distance(
        "gates frozen at the end of the prompt, an approximation", every_PV.max().item(),
        every_PV.mean().item(), torch.cat(effects).mean().item(), torch.cat(same).mean().item(),
        len(every_PV),
    )  # fmt: skip


def engine_options(
    base: str, adapter: RoutedAdapter, dtype: str, vocabulary: int, longest: int
) -> dict[str, Any]:
    """What vLLM's `LLM` needs to serve this adapter and to answer with log-probabilities."""
    options: dict[str, Any] = {
        "model": base, "dtype": dtype, "skip_tokenizer_init": True, "enforce_eager": True,
        "enable_lora": True, "max_loras": 1, "max_model_len": longest + NEW_TOKENS,
        "max_lora_rank": slot_rank(adapter.rank) or RANKS[-1],
        "max_logprobs": -1 if vocabulary <= _WHOLE_VOCABULARY else _LIKELIEST,
        "disable_log_stats": True, "seed": 0,
    }  # fmt: skip
    settings: dict[str, Any] = {}
    rows = adapter.router_rows
    if rows > LoraExtSettings().router_rows(options["max_lora_rank"]):
        settings["max_router_rows"] = rows
    if adapter.classifier is not None:
        settings |= {"two_pass": True, "max_gates": adapter.classifier.gates}
    if settings:
        options["additional_config"] = {"lora_ext": settings}
    return options


def ask_engine(llm: Any, requests: list[tuple[list[int], Any]], vocabulary: int) -> list[Answer]:
    """Log-probabilities and greedy tokens of an offline vLLM engine, all requests in one call.

    Args:
        requests: token ids, and a LoRARequest or None for the base model.
    Raises:
        AdapterError: the engine refused the adapter.
    """
    from vllm import SamplingParams

    most = -1 if vocabulary <= _WHOLE_VOCABULARY else _LIKELIEST
    params = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=most,
        prompt_logprobs=most,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
    loras = [lora for _, lora in requests]
    try:
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    except Exception as error:
        if (known := AdapterError.parse(str(error))) is not None:
            raise known from error
        raise
    answers = []
    for output in outputs:
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        plain = [{token: entry.logprob for token, entry in row.items()} for row in rows]
        answers.append((plain, list(output.outputs[0].token_ids)))
    return answers


def compare_engine(
    llm: Any, lora: Any, with_adapter: list[Sequence], without: list[Sequence]
) -> list[Comparison]:
    """Rows of the adapter and of the base model, mixed in one batch, against transformers."""
    vocabulary = with_adapter[0].logp_PV.shape[1]
    asked = [(s.prompt, lora) for s in with_adapter] + [(s.prompt, None) for s in without]
    got = ask_engine(llm, asked, vocabulary)
    half = len(with_adapter)
    return [
        compare("vLLM", with_adapter, got[:half]),
        compare("vLLM, base rows beside it", without, got[half:]),
    ]


def effect(with_adapter: list[Sequence], without: list[Sequence]) -> float:
    """Mean |log-probability with the adapter - without| over the prompts' positions."""
    diffs = [
        (a.logp_PV[: len(a.prompt)] - b.logp_PV[: len(b.prompt)]).abs().mean().item()
        for a, b in zip(with_adapter, without, strict=True)
    ]
    return sum(diffs) / len(diffs)


def _everywhere(model: Any, adapter: RoutedAdapter | None) -> AbstractContextManager[Any]:
    """An adapter that acts on every token alike, for as many prompts as there are."""
    if adapter is None or adapter.columns or _is_frozen(adapter):
        return nullcontext()
    return apply_adapter(model, adapter)


def _by_column(
    model: Any, adapter: RoutedAdapter | None, prompt: list[int], length: int
) -> AbstractContextManager[Any]:
    """One whose columns say at which of a prompt's and its answer's tokens it acts, or whose gates
    are frozen between the two."""
    if adapter is not None and _is_frozen(adapter):
        return apply_adapter(model, adapter, prompt_length=len(prompt))
    if adapter is None or not adapter.columns:
        return nullcontext()
    rows_TC = values(adapter.columns, Prompt(len(prompt), prompt, {}), 0, length)
    return apply_adapter(model, adapter, torch.from_numpy(rows_TC))


def _is_frozen(adapter: RoutedAdapter) -> bool:
    return adapter.classifier is not None and adapter.classifier.frozen


def _invoke(adapter: RoutedAdapter, ids_T: torch.Tensor) -> None:
    """Puts invocations into the midst of a prompt that has room: an Activated LoRA without one
    would be the base model."""
    for column in adapter.columns:
        count, start = len(column.invocation), len(ids_T) // 2
        if count and start + count <= len(ids_T):
            ids_T[start : start + count] = torch.tensor(column.invocation)


def _logits(model: Any, ids_T: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """[T, V] float32; `noise` is the embeddings' relative disturbance."""
    with torch.inference_mode():
        x_1TK = model.get_input_embeddings()(ids_T[None])
        if noise:
            random = torch.randn(x_1TK.shape, generator=torch.Generator().manual_seed(0))
            x_1TK = x_1TK * (1 + noise * random)
        return model(inputs_embeds=x_1TK).logits[0].float()
