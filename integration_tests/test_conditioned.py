"""What a request says of its adapters, offline: the authors' numbers, cold, from the prefix cache,
in chunks, after a preemption, and in one batch with other requests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from integration_tests.engines import FIXTURES, greedy, lora, recorded, run, tokens, worst

pytestmark = pytest.mark.engine
BOUND = 2e-3


@dataclass(frozen=True)
class Case:
    """One request, and what it must answer."""

    key: str
    prompt: Any  # token ids, or embeddings [T, d]
    answer: list[int]
    logits: torch.Tensor  # [n, V], of the first n tokens of the answer
    adapter: Any = None
    says: dict[str, Any] = field(default_factory=dict)


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


def load(llm: Any) -> None:
    """All that the mixes name, and that requests name themselves."""
    for name in ("spans-a", "scales-a"):
        for part in ("red", "green", "blue"):
            llm.llm_engine.add_lora(adapter(name, part))


def ask(llm: Any, cases: list[Case], **more: Any) -> list[Any]:
    prompts = [
        {"prompt_token_ids": c.prompt} if isinstance(c.prompt, list)
        else {"prompt_embeds": c.prompt} for c in cases
    ]  # fmt: skip
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


def test_the_authors_numbers_in_one_batch(llama: Any) -> None:
    """More adapters than slots; prompts longer than a step of 64 tokens between others."""
    load(llama)
    cases = [*mixes("spans-a"), *mixes("scales-a"), *aloras(), *others()]
    shuffled = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
    check(shuffled, ask(llama, shuffled, skip_reading_prefix_cache=True))
    for case in cases:  # alone
        check([case], ask(llama, [case], skip_reading_prefix_cache=True))
    check(shuffled, ask(llama, shuffled))
    check(shuffled, ask(llama, shuffled))  # from the prefix cache


def test_chains_of_activated_loras_share_the_base(llama: Any) -> None:
    assert llama.reset_prefix_cache()
    hits: dict[int, list[int]] = {}
    for number in (0, 1):
        steps = chain(number)
        for case in steps:
            (output,) = ask(llama, [case])
            check([case], [output])
            hits.setdefault(number, []).append(output.num_cached_tokens)
        check(steps, ask(llama, steps))
        check(steps, ask(llama, steps, skip_reading_prefix_cache=True))
    assert hits == {0: [0, 32, 32, 32, 32], 1: [0, 32, 32, 32, 64]}


def test_mixes_share_what_they_agree_on(llama: Any) -> None:
    load(llama)
    assert llama.reset_prefix_cache()
    prompt = [int(t) for t in np.random.default_rng(1).integers(40, 500, 150)]
    red, green, blue = (f"spans-a-{name}" for name in ("red", "green", "blue"))

    def hits(*adapters: dict[str, Any], own: Any = None) -> int:
        says = {"adapters": list(adapters)} if adapters else {}
        (output,) = ask(llama, [Case("", prompt, [0], torch.empty(0, 512), own, says)])
        found: int = output.num_cached_tokens
        return found

    late = {"name": green, "spans": [[70, None]]}
    assert hits() == 0
    assert hits({"name": red, "spans": [[64, 96]]}) == 64, "the base's"
    assert hits({"name": red, "spans": [[100, 120]]}) == 96
    assert hits(own=adapter("spans-a", "red")) == 0
    assert hits({"name": red}, late) == 64, "of the plain adapter"
    assert hits({"name": red}, late, {"name": blue, "spans": [[128, 140]]}) == 128
    assert hits({"name": red}, {"name": blue, "spans": [[128, 140]]}) == 128
    assert hits({"name": red, "scale": 0.5}) == 0
    assert hits({"name": red, "scale": 0.5}, late) == 64
