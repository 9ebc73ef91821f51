"""What a request says of its adapters, offline: the authors' numbers, cold, from the prefix cache,
in chunks, after a preemption, and in one batch with other requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from integration_tests import given
from integration_tests.conditioned import (
    BOUND,
    Case,
    adapter,
    aloras,
    ask,
    chain,
    check,
    check_beginnings,
    check_no_block_is_stale,
    first_logprobs,
    images,
    load,
    mixes,
    others,
    parts,
    preempted,
)
from integration_tests.engines import FIXTURES, greedy, lora, recorded, run, tokens
from integration_tests.recorded_requests import examples
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.trace import fetch

pytestmark = pytest.mark.engine


def test_the_authors_numbers_in_one_batch(llama: Any, tmp_path: Path) -> None:
    """More adapters than slots; prompts longer than a step of 64 tokens between others."""
    load(llama)
    llama.llm_engine.add_lora(lora("mixlora-a", recorded("mixlora-a").folder))
    cases = [*mixes("spans-a"), *mixes("scales-a"), *aloras(), *others()]
    cases += [*given.gates(tmp_path / "library"), *given.images(tmp_path / "mmlora")]
    cases += given.experts()
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


def test_whoever_comes_first_the_base_is_shared(llama: Any) -> None:
    """Activated LoRAs, then the base, then other ones: each finds what was computed without it."""
    assert llama.reset_prefix_cache()
    text = [int(t) for t in np.random.default_rng(2).integers(40, 500, 150)]
    judge, rewrite = (adapter("alora_chain-a", name) for name in ("judge", "rewrite"))
    text[100:103], text[140:142] = [21, 22, 23], [31, 32]  # their invocations
    cases = [
        Case(name, prompt, [0], torch.empty(0, 512), own)
        for name, prompt, own in (
            ("judge first", text[:110], judge), ("the base", text[:130], None),
            ("rewrite", text, rewrite), ("judge again", text, judge), ("alora-a", text, None),
        )
    ]  # fmt: skip
    found = [ask(llama, [case])[0] for case in cases]
    assert [o.num_cached_tokens for o in found] == [0, 96, 128, 96, 128]
    fresh = ask(llama, cases, skip_reading_prefix_cache=True)
    for case, one, other in zip(cases, found, fresh, strict=True):
        got, want = (first_logprobs(o, 512) for o in (one, other))
        assert (got - want).abs().max() < BOUND, case.key


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


def drawn(rng: np.random.Generator, prompt: list[int], library: Any) -> Case:
    """Any request over a prompt: base, one adapter, gates, a mix, experts that are blocks in one,
    an Activated LoRA."""
    kind = rng.choice(["base", "plain", "alora", "gates", "mix", "mix", "mix", "experts"])
    own, says = None, {}
    if kind in ("plain", "alora", "gates"):
        one = {"plain": adapter("spans-a", "red"), "alora": adapter("alora-a"), "gates": library}
        own = one[str(kind)]
    elif kind == "mix":
        names = ["spans-a-red", "spans-a-green", "spans-a-blue", "alora-a", library.lora_name]
        says["adapters"] = parts(rng, names, len(prompt))
    elif kind == "experts":
        says["adapters"] = parts(rng, ["mixlora-a", "spans-a-green"], len(prompt))
    if kind == "gates" or any(a["name"] == library.lora_name for a in says.get("adapters", ())):
        says["gates"] = {name: float(rng.choice([1.0, 0.5, -1.0, 0.0])) for name in given.EXPERTS}
    return Case(f"{kind} {says}", prompt, [0] * 4, torch.empty(0, 512), own, says)


@pytest.fixture
def library(llama: Any, tmp_path: Path) -> Iterator[Any]:
    request = given.library(tmp_path / "library")
    assert llama.llm_engine.add_lora(request)
    yield request
    llama.llm_engine.remove_lora(request.lora_int_id)


def test_no_block_is_stale(llama: Any, library: Any) -> None:
    load(llama)
    for own in (adapter("alora-a"), lora("mixlora-a", recorded("mixlora-a").folder)):
        llama.llm_engine.add_lora(own)
    rng = np.random.default_rng(5)
    text = [int(t) for t in rng.integers(40, 500, 160)]
    text[60:63] = text[130:133] = [11, 12, 13]  # the invocation
    found = check_no_block_is_stale(llama, rng, text, lambda r, p: drawn(r, p, library))
    assert found > 2000


@pytest.mark.parametrize("asks", [{"lora_ext_trace": True}, {"lora_ext": {"trace": True}}])
def test_an_engine_without_the_setting_has_no_traces(llama: Any, asks: dict[str, Any]) -> None:
    fx = recorded("loramoe-a")
    request = [([5, 6, 7], lora("untraced", fx.folder))]
    with pytest.raises(AdapterError) as caught:
        run(llama, request, greedy(2, extra_args=asks))
    assert caught.value.code == "not_traced"
    (output,) = run(llama, request, greedy(2))
    with pytest.raises(AdapterError) as caught:
        fetch(llama, output.request_id)
    assert caught.value.code == "not_traced"


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
