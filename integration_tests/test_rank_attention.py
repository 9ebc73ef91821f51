"""Attention over earlier A x in engines, against transformers: cold, from the prefix cache, in
chunks, after a preemption, and in one batch with every other kind of request. `llama_eager` runs
without a compiler and prefills in one piece, `qwen2` is compiled and prefills 64 tokens at a
time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration_tests import reference_model
from integration_tests.conditioned import (
    BOUND,
    Case,
    ask,
    check,
    check_beginnings,
    others,
    preempted,
    xloras,
)
from integration_tests.engines import lora, prompt_logprobs, worst
from tests.make_adapters import random_adapter
from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.verify import NEW_TOKENS, follow

pytestmark = pytest.mark.engine
SHAPES = {"two": (4, 4), "four": (3, 3, 3, 3), "one": (8,)}
XLORA = {"llama_eager": "xlora_topk-a", "qwen2": "xlora_flat-a"}
BASES = {"llama_eager": "base_llama", "qwen2": "base_qwen2"}
ENGINES = pytest.mark.parametrize("engine", ["llama_eager", "qwen2"], ids=["eager", "compiled"])


def adapters(folder: Path, base: str) -> list[Any]:
    """Of several numbers of heads, on all linear layers or on some."""
    config, found = reference_model.model(base).config, []
    for number, (name, blocks) in enumerate(SHAPES.items()):
        targets = {"targets": ("v_proj", "down_proj")} if name == "one" else {}
        made = random_adapter(config, number, GateSpec("attention", blocks=blocks), **targets)
        found.append(lora(f"ranks-{base}-{name}", write_native(made, folder / name)))
    return found


def cases_of(one: Any, base: str, prompts: list[list[int]]) -> list[Case]:
    return [
        Case(one.lora_name, s.prompt, s.greedy, s.logp_PV[-NEW_TOKENS:], one)
        for s in follow(reference_model.model(base), load_adapter(one.lora_path), prompts)
    ]


@ENGINES
def test_cold_cached_preempted_and_beside_others(
    engine: str, request: Any, tmp_path: Path
) -> None:  # fmt: skip
    llm, base = request.getfixturevalue(engine), BASES[engine]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 380, length).tolist() for length in (1, 30, 47, 70)]
    cases = [c for one in adapters(tmp_path, base) for c in cases_of(one, base, prompts)]
    for case in cases[::4]:
        check([case], ask(llm, [case], skip_reading_prefix_cache=True))
    check(cases, ask(llm, cases))
    outputs = ask(llm, cases)
    check(cases, outputs)
    assert outputs[3].num_cached_tokens == 64
    some = cases[::3]
    check_beginnings(some, preempted(llm, some))
    beside = [*cases, *xloras(XLORA[engine]), *(others() if base == "base_llama" else ())]
    shuffled = [beside[i] for i in rng.permutation(len(beside))]
    check(shuffled, ask(llm, shuffled, skip_reading_prefix_cache=True))
    check(shuffled, ask(llm, shuffled))


@ENGINES
def test_a_long_prompt_in_chunks_and_from_the_prefix_cache(
    engine: str, request: Any, tmp_path: Path
) -> None:
    llm, base = request.getfixturevalue(engine), BASES[engine]
    one, other, _ = adapters(tmp_path, base)
    own = load_adapter(one.lora_path)
    prompt = reference_model.steady_prompt(base, own, 150, 3)
    want = reference_model.logits(base, own, prompt)
    theirs = reference_model.logits(base, load_adapter(other.lora_path), prompt)
    assert llm.reset_prefix_cache()
    for cached in (False, True):
        asked = [(prompt, one), (prompt, None), (prompt, other)]
        got, plain, too = prompt_logprobs(llm, asked, want.shape[1])
        assert worst(got, want) < BOUND and worst(too, theirs) < BOUND, cached
        assert worst(plain, reference_model.logits(base, None, prompt)) < BOUND
    (case,) = cases_of(one, base, [prompt])
    (output,) = ask(llm, [case])
    check([case], [output])
    assert output.num_cached_tokens == 128
