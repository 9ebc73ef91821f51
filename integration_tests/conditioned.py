"""Requests that say something of their adapters, and the authors' numbers for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from integration_tests.engines import FIXTURES, greedy, lora, recorded, tokens, worst

BOUND = 2e-3
USERS = ("reclora-a", "reclora_token-a", "reclora_lora-a", "reclora_ft-a")
WAVLLM, IMAGES = "wavllm-a", "mmlora-a"


@dataclass(frozen=True)
class Case:
    """One request, and what it must answer."""

    key: str
    prompt: Any  # token ids, embeddings [T, d], or a prompt of vLLM's
    answer: list[int]
    logits: torch.Tensor  # [n, V], of the first n tokens of the answer
    adapter: Any = None
    says: dict[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        if isinstance(self.prompt, dict):
            return self.prompt
        ids = isinstance(self.prompt, list)
        return {"prompt_token_ids" if ids else "prompt_embeds": self.prompt}


@cache
def fixture(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    root = FIXTURES / "conditioned" / name
    return json.loads((root / "meta.json").read_text()), load_file(root / "expected.safetensors")


def adapter(name: str, part: str = "") -> Any:
    """Its name is the fixture's, so that two fixtures' `red` do not meet."""
    folder = FIXTURES / "conditioned" / name / ("adapters" if part else "adapter") / part
    return lora(f"{name}-{part}" if part else name, folder)


def mixes(name: str) -> list[Case]:
    meta, numbers = fixture(name)
    cases = []
    for said in meta["requests"]:
        key = f"r{said['request']}"
        if f"greedy_{key}" not in numbers:
            continue
        adapters = [a | {"name": f"{name}-{a['name']}"} for a in said["adapters"]]
        prompt = numbers[f"prompt_{said['prompt']}"].tolist()
        last = numbers[f"logits_{key}"][-1:]
        logits = numbers.get(f"greedy_logits_{key}", last)
        cases.append(Case(
            f"{name} {key}", prompt, numbers[f"greedy_{key}"].tolist(), logits,
            says={"adapters": adapters},
        ))  # fmt: skip
    return cases


def aloras() -> list[Case]:
    meta, numbers = fixture("alora-a")
    cases = []
    for i in range(len(meta["prompt_lens"])):
        prompt, answer = numbers[f"prompt_{i}"].tolist(), numbers[f"greedy_{i}"].tolist()
        logits = numbers.get(f"greedy_logits_{i}", numbers[f"logits_{i}"][-1:])
        cases.append(Case(f"alora-a {i}", prompt, answer, logits, adapter("alora-a")))
    return cases


def chain(number: int) -> list[Case]:
    meta, numbers = fixture("alora_chain-a")
    cases = []
    for step in meta["chains"][number]["steps"]:
        key = f"c{number}_s{step['step']}"
        own = adapter("alora_chain-a", step["adapter"]) if step["adapter"] else None
        prompt, answer = numbers[f"input_{key}"].tolist(), numbers[f"greedy_{key}"].tolist()
        cases.append(
            Case(f"alora_chain-a {key}", prompt, answer, numbers[f"greedy_logits_{key}"], own)
        )
    return cases


def images() -> list[Case]:
    meta, numbers = fixture("mmlora-a")
    cases = []
    for i, said in enumerate(meta["requests"]):
        embeds = said["input"] == "embeds"
        prompt = numbers[f"embeds_{i}"] if embeds else numbers[f"prompt_{i}"].tolist()
        spans = {"modality_spans": {"image": said["visual_spans"]}} if said["visual_spans"] else {}
        logits = numbers.get(f"greedy_logits_{i}", numbers[f"logits_{i}"][-1:])
        cases.append(Case(
            f"mmlora-a {i}", prompt, numbers[f"greedy_{i}"].tolist(), logits, adapter("mmlora-a"),
            spans,
        ))  # fmt: skip
    return cases


def users() -> list[Case]:
    cases = []
    for name in USERS:
        meta, numbers = fixture(name)
        for said in meta["requests"]:
            key, prompt = said["key"], numbers[f"prompt_{said['prompt']}"].tolist()
            logits = numbers.get(f"greedy_logits_{key}", numbers[f"logits_{key}"][-1:])
            says = {"user": numbers[f"user_vec_{said['user']}"].tolist()}
            cases.append(Case(
                f"{name} {key}", prompt, numbers[f"greedy_{key}"].tolist(), logits, adapter(name),
                says,
            ))  # fmt: skip
    return cases


def instructions() -> list[Case]:
    meta, numbers = fixture(WAVLLM)
    cases = []
    for said in meta["requests"]:
        i = said["prompt"]
        logits = numbers.get(f"greedy_logits_{i}", numbers[f"logits_{i}"][-1:])
        says = {"instruction": {"ids": numbers[f"gate_ids_{i}"].tolist()}}
        cases.append(Case(
            f"{WAVLLM} {i}", numbers[f"prompt_{i}"].tolist(), numbers[f"greedy_{i}"].tolist(),
            logits, adapter(WAVLLM), says,
        ))  # fmt: skip
    return cases


def xloras(*names: str) -> list[Case]:
    cases = []
    for name in names:
        meta, numbers = fixture(name)
        for i in range(len(meta["prompt_lens"])):
            prompt, answer = numbers[f"prompt_{i}"].tolist(), numbers[f"greedy_{i}"].tolist()
            logits = numbers.get(f"greedy_logits_{i}", numbers[f"logits_{i}"][-1:])
            cases.append(Case(f"{name} {i}", prompt, answer, logits, adapter(name)))
    return cases


def load(llm: Any) -> None:
    """All that the mixes name, and that requests name themselves."""
    for name in ("spans-a", "scales-a"):
        for part in ("red", "green", "blue"):
            llm.llm_engine.add_lora(adapter(name, part))


def ask(llm: Any, cases: list[Case], **more: Any) -> list[Any]:
    prompts = [c.given for c in cases]
    params = [
        greedy(
            len(c.answer), logprobs=-1, extra_args={"lora_ext": c.says} if c.says else None, **more
        )
        for c in cases
    ]
    return llm.generate(prompts, params, lora_request=[c.adapter for c in cases], use_tqdm=False)


def check(cases: list[Case], outputs: list[Any]) -> None:
    for case, output in zip(cases, outputs, strict=True):
        assert tokens(output) == case.answer, case.key
        rows = output.outputs[0].logprobs[: len(case.logits)]
        got = torch.full(case.logits.shape, float("nan"))
        for i, row in enumerate(rows):
            for token, entry in row.items():
                got[i, token] = entry.logprob
        assert worst(got, case.logits) < BOUND, case.key


def others() -> list[Case]:
    """Plain, routed and base requests, by their own fixtures."""
    cases = []
    for name in ("plain-a", "loramoe-a", "mixlora-a"):
        r = recorded(name)
        cases.append(Case(name, r.prompts[1], r.greedy[1], r.logits[1][-1:], lora(name, r.folder)))
    return cases


def preempted(llm: Any, cases: list[Case]) -> list[Any]:
    """Their outputs, when all of them were put back in the midst of their answers."""
    engine, done = llm.llm_engine, {}
    for i, case in enumerate(cases):
        params = greedy(
            len(case.answer) + 60, logprobs=-1, skip_reading_prefix_cache=False,
            extra_args={"lora_ext": case.says} if case.says else None,
        )  # fmt: skip
        engine.add_request(str(i), case.given, params, lora_request=case.adapter)
    outputs = engine.step()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert engine.get_num_unfinished_requests() == len(cases)
    while engine.has_unfinished_requests():
        done |= {int(o.request_id.split("-")[0]): o for o in outputs if o.finished}
        outputs = engine.step()
    done |= {int(o.request_id.split("-")[0]): o for o in outputs if o.finished}
    return [done[i] for i in range(len(cases))]


def check_beginnings(cases: list[Case], outputs: list[Any]) -> None:
    for output, case in zip(outputs, cases, strict=True):
        output.outputs[0].token_ids = output.outputs[0].token_ids[: len(case.answer)]
    check(cases, outputs)


def parts(
    rng: np.random.Generator, names: list[str], length: int, kind: str = ""
) -> list[dict[str, Any]]:
    """Some of these adapters, with scales and spans, or for a `kind` of input."""
    chosen: list[dict[str, Any]] = [
        {"name": str(name)} for name in rng.permutation(names)[: rng.integers(1, 4)]
    ]
    for one in chosen:
        if rng.random() < 0.4:
            one["scale"] = float(rng.choice([0.5, -1.0, 2.0, 0.0]))
        if rng.random() < 0.6:
            start = int(rng.integers(0, length))
            stop = None if rng.random() < 0.4 else start + int(rng.integers(1, 80))
            one["spans"] = [[start, stop]]
        if kind and rng.random() < 0.3:
            one["modality"] = str(rng.choice([kind, "text"]))
    return chosen


def first_logprobs(output: Any, vocabulary: int) -> torch.Tensor:
    """[V]: of an answer's first token."""
    row = output.outputs[0].logprobs[0]
    return torch.tensor([row[token].logprob for token in range(vocabulary)])


def check_no_block_is_stale(
    llm: Any,
    rng: np.random.Generator,
    text: list[int],
    draw: Callable[[np.random.Generator, list[int]], Case],
) -> int:
    """Random requests over shared beginnings, answers among them, against the same requests that
    read nothing from the prefix cache, and some of them against an engine whose cache is empty.

    Args:
        text: whose beginnings are the prompts; draw: any request over a prompt.
    Returns:
        How many tokens came out of the prefix cache.
    """
    prompts, found, seen = [text[:n] for n in (40, 100, 128, 160)], 0, []
    vocabulary = llm.model_config.get_vocab_size()
    for _ in range(12):
        cases = [draw(rng, prompts[rng.integers(len(prompts))]) for _ in range(8)]
        warm = ask(llm, cases)
        fresh = ask(llm, cases, skip_reading_prefix_cache=True)
        found += sum(o.num_cached_tokens for o in warm)
        for case, a, b in zip(cases, warm, fresh, strict=True):
            got, want = (first_logprobs(o, vocabulary) for o in (a, b))
            assert (got - want).abs().max() < BOUND, case.key
            seen.append((case, got))
        longest = max(warm, key=lambda o: len(o.prompt_token_ids))
        if len(longest.prompt_token_ids) < 200:
            prompts.append([*longest.prompt_token_ids, *tokens(longest)])
    for i in rng.permutation(len(seen))[:16]:
        assert llm.reset_prefix_cache()
        (output,) = ask(llm, [seen[i][0]])
        assert output.num_cached_tokens == 0
        assert (first_logprobs(output, vocabulary) - seen[i][1]).abs().max() < BOUND
    return found
