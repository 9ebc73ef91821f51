"""What a request says of its adapters, offline: the authors' numbers, cold, from the prefix cache,
in chunks, after a preemption, and in one batch with other requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from integration_tests.conditioned import (
    BOUND,
    Case,
    adapter,
    aloras,
    ask,
    chain,
    check,
    check_beginnings,
    images,
    load,
    mixes,
    others,
    preempted,
)
from integration_tests.engines import FIXTURES, tokens
from integration_tests.recorded_requests import examples

pytestmark = pytest.mark.engine


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
    assert hits == {0: [0, 32, 32, 32, 32], 1: [0, 32, 32, 32, 32]}


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


def test_after_a_preemption(llama: Any) -> None:
    load(llama)
    cases = [*mixes("spans-a")[:4], *aloras()[1:], *others()[:1]]
    check_beginnings(cases, preempted(llama, cases))


def test_modalities_of_ids_and_of_embeddings(llama_mha: Any) -> None:
    cases = images()
    assert {isinstance(case.prompt, list) for case in cases} == {True, False}
    check(cases, ask(llama_mha, cases))
    check(cases, ask(llama_mha, cases))  # from the prefix cache
    for case in cases:
        check([case], ask(llama_mha, [case], skip_reading_prefix_cache=True))
    check_beginnings(cases, preempted(llama_mha, cases))


def drawn(rng: np.random.Generator, prompt: list[int]) -> Case:
    """Any request over a prompt: base, one adapter, a mix, an Activated LoRA."""
    kind = rng.choice(["base", "plain", "alora", "mix", "mix", "mix"])
    own, says = None, {}
    if kind in ("plain", "alora"):
        own = adapter("alora-a") if kind == "alora" else adapter("spans-a", "red")
    elif kind == "mix":
        names = rng.permutation(["spans-a-red", "spans-a-green", "spans-a-blue", "alora-a"])
        chosen = [{"name": str(name)} for name in names[: rng.integers(1, 4)]]
        for one in chosen:
            if rng.random() < 0.4:
                one["scale"] = float(rng.choice([0.5, -1.0, 2.0, 0.0]))
            if rng.random() < 0.6:
                start = int(rng.integers(0, len(prompt)))
                stop = None if rng.random() < 0.4 else start + int(rng.integers(1, 80))
                one["spans"] = [[start, stop]]
        says = {"adapters": chosen}
    return Case(f"{kind} {says}", prompt, [0] * 4, torch.empty(0, 512), own, says)


def test_no_block_is_stale(llama: Any) -> None:
    """Random requests over shared beginnings, answers among them, against no prefix cache."""
    load(llama)
    llama.llm_engine.add_lora(adapter("alora-a"))
    rng = np.random.default_rng(5)
    text = [int(t) for t in rng.integers(40, 500, 160)]
    text[60:63] = text[130:133] = [11, 12, 13]  # the invocation
    prompts, found = [text[:n] for n in (40, 100, 128, 160)], 0
    for _ in range(12):
        cases = [drawn(rng, prompts[rng.integers(len(prompts))]) for _ in range(8)]
        warm = ask(llama, cases)
        fresh = ask(llama, cases, skip_reading_prefix_cache=True)
        found += sum(o.num_cached_tokens for o in warm)
        for case, a, b in zip(cases, warm, fresh, strict=True):
            got, want = (
                torch.tensor([o.outputs[0].logprobs[0][t].logprob for t in range(512)])
                for o in (a, b)
            )
            assert (got - want).abs().max() < BOUND, case.key
        longest = max(warm, key=lambda o: len(o.prompt_token_ids))
        if len(longest.prompt_token_ids) < 200:
            prompts.append([*longest.prompt_token_ids, *tokens(longest)])
    assert found > 2000


def test_the_offline_example_of_the_docs(llama: Any) -> None:
    folders = FIXTURES / "conditioned" / "scales-a" / "adapters"
    (block,) = examples("requests.md", "offline")
    block = block.replace('"adapters/', f'"{folders}/')
    block = block.replace("max_tokens=8", "max_tokens=8, detokenize=False, ignore_eos=True")
    scope: dict[str, Any] = {"llm": llama, "prompt": {"prompt_token_ids": list(range(40, 52))}}
    exec(compile(block, "docs/requests.md", "exec"), scope)
    assert len(tokens(scope["answer"])) == 8
    for number in (101, 102):
        llama.llm_engine.remove_lora(number)
