"""X-LoRA in engines: PEFT's numbers, cold, from the prefix cache, in chunks, after a preemption,
and in one batch with every other kind of request. `llama_eager` runs without a compiler and
prefills in one piece, `qwen2` is compiled and prefills 64 tokens at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from integration_tests import reference_model
from integration_tests.conditioned import (
    BOUND,
    Case,
    adapter,
    aloras,
    ask,
    check,
    check_beginnings,
    fixture,
    load,
    mixes,
    others,
    preempted,
    xloras,
)
from integration_tests.engines import lora as request_for
from integration_tests.engines import prompt_logprobs, recorded, tokens, worst
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.verify import NEW_TOKENS, follow

pytestmark = pytest.mark.engine
LLAMA, QWEN = ("xlora_topk-a", "xlora_lw_topk-a"), ("xlora_flat-a", "xlora_lw-a")
ENGINES = pytest.mark.parametrize(
    ("engine", "names"), [("llama_eager", LLAMA), ("qwen2", QWEN)], ids=["eager", "compiled"]
)


def passes(worker: Any) -> int:
    """In a rank: first passes since this was asked before."""
    two_pass = worker.model_runner.lora_manager._adapter_manager._two_pass
    if not hasattr(two_pass, "counted"):
        fill = two_pass._fill

        def counting(hidden_TK: torch.Tensor) -> None:
            two_pass.counted += 1
            fill(hidden_TK)

        two_pass._fill, two_pass.counted = counting, 0
    found, two_pass.counted = two_pass.counted, 0
    return int(found)


@ENGINES
def test_pefts_numbers(engine: str, names: tuple[str, ...], request: Any) -> None:
    llm = request.getfixturevalue(engine)
    cases = xloras(*names)
    for case in cases:
        check([case], ask(llm, [case], skip_reading_prefix_cache=True))
    check(cases, ask(llm, cases))
    check(cases, ask(llm, cases))  # from the prefix cache
    check_beginnings(cases, preempted(llm, cases))
    for name in names:
        _, numbers = fixture(name)
        for i in (0, 1):
            prompt, logits = numbers[f"prompt_{i}"].tolist(), numbers[f"logits_{i}"]
            (got,) = prompt_logprobs(llm, [(prompt, adapter(name))], logits.shape[1])
            assert worst(got, logits) < BOUND


def test_beside_every_other_kind(llama_eager: Any) -> None:
    """More adapters than slots."""
    load(llama_eager)
    cases = [*xloras(*LLAMA), *mixes("spans-a"), *mixes("scales-a"), *aloras(), *others()]
    base = recorded("plain-a")
    last = base.base_logits[1][-1:]
    cases.append(Case("base", base.prompts[1], [int(last.argmax())], last))
    shuffled = [cases[i] for i in np.random.default_rng(1).permutation(len(cases))]
    check(shuffled, ask(llama_eager, shuffled, skip_reading_prefix_cache=True))
    check(shuffled, ask(llama_eager, shuffled))
    check_beginnings(shuffled[:8], preempted(llama_eager, shuffled[:8]))


@pytest.mark.parametrize("name", QWEN)
def test_a_long_prompt_in_chunks_and_from_the_prefix_cache(name: str, qwen2: Any) -> None:
    """Against transformers, which runs whole sequences; other requests share the chunks' steps, and
    one without X-LoRA has computed the same tokens before."""
    own, model = load_adapter(adapter(name).lora_path), "base_qwen2"
    prompt = reference_model.steady_prompt(model, own, 150, 3)
    want = reference_model.logits(model, own, prompt)
    other = recorded("meteora-a")
    beside = [(other.prompts[2], request_for("meteora-a", other.folder)), (prompt, None)]
    assert qwen2.reset_prefix_cache()
    for cached in (False, True):
        got, _, base = prompt_logprobs(qwen2, [(prompt, adapter(name)), *beside], want.shape[1])
        assert worst(got, want) < BOUND, cached
        assert worst(base, reference_model.logits(model, None, prompt)) < BOUND
    case = Case(name, prompt, [int(want[-1].argmax())], want[-1:], adapter(name))
    (output,) = ask(qwen2, [case])
    check([case], [output])
    assert output.num_cached_tokens == 128, "by its own blocks, not the base's"


def test_only_steps_with_such_rows_run_twice(llama_eager: Any) -> None:
    llama_eager.collective_rpc(passes)
    for cases, want in ((others()[:1], 0), (xloras(*LLAMA)[:1], 12), (others()[:1], 0)):
        check(cases, ask(llama_eager, cases))
        assert llama_eager.collective_rpc(passes) == [want]


def frozen(folder: Path, name: str) -> Any:
    """A fixture whose sidecar says that gates are frozen."""
    shutil.copytree(adapter(name).lora_path, folder / name, dirs_exist_ok=True)
    (folder / name / "routing.json").write_text('{"gates": "frozen"}')
    return request_for(f"frozen-{name}", folder / name)


def frozen_cases(one: Any, name: str) -> list[Case]:
    """What transformers answers with its gates."""
    own, model = load_adapter(one.lora_path), reference_model.model(fixture(name)[0]["base"])
    prompts = [case.prompt for case in xloras(name)]
    return [
        Case(f"frozen {name}", s.prompt, s.greedy, s.logp_PV[-NEW_TOKENS:], one)
        for s in follow(model, own, prompts)
    ]


@ENGINES
def test_frozen_gates(engine: str, names: tuple[str, ...], request: Any, tmp_path: Path) -> None:
    """Cold, from the prefix cache, after a preemption, and beside requests for the exact adapter,
    which have the same prompts: neither finds the other's blocks."""
    llm = request.getfixturevalue(engine)
    cases = [case for name in names for case in frozen_cases(frozen(tmp_path, name), name)]
    check(cases, ask(llm, cases, skip_reading_prefix_cache=True))
    both = [case for pair in zip(cases, xloras(*names), strict=True) for case in pair]
    check(both, ask(llm, both))
    check(both, ask(llm, both))
    check_beginnings(both, preempted(llm, both))


def test_frozen_gates_take_one_pass_and_what_follows_finds_none_of_it(
    llama_eager: Any, tmp_path: Path
) -> None:
    """A next turn, whose prompt holds the answer, is computed exactly, up to its own end."""
    name = LLAMA[1]
    one, model = frozen(tmp_path, name), reference_model.model("base_llama")
    prompt = xloras(name)[1].prompt
    (first,) = follow(model, load_adapter(one.lora_path), [prompt])
    case = Case("first", prompt, first.greedy, first.logp_PV[-NEW_TOKENS:], one)
    llama_eager.collective_rpc(passes)
    (output,) = ask(llama_eager, [replace(case, answer=case.answer * 12)])
    assert llama_eager.collective_rpc(passes) == [1]
    turn = prompt + tokens(output)
    (second,) = follow(model, load_adapter(one.lora_path), [turn])
    case = replace(case, prompt=turn, answer=second.greedy, logits=second.logp_PV[-NEW_TOKENS:])
    (again,) = ask(llama_eager, [case])
    check([case], [again])
    assert again.num_cached_tokens == len(prompt) // 32 * 32


def test_a_slot_that_comes_back(llama_eager: Any) -> None:
    """Its classifier leaves with it, and so do its blocks with its content."""
    (case, *_) = xloras(*LLAMA)
    assert tokens(ask(llama_eager, [case])[0]) == case.answer
    assert llama_eager.llm_engine.remove_lora(case.adapter.lora_int_id)
    check([case], ask(llama_eager, [case]))
