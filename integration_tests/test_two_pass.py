"""X-LoRA in engines: PEFT's numbers, cold, from the prefix cache, in chunks, after a preemption,
and in one batch with every other kind of request. `llama_eager` runs without a compiler and
prefills in one piece, `qwen2` is compiled and prefills 64 tokens at a time."""

from __future__ import annotations

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


def test_a_slot_that_comes_back(llama_eager: Any) -> None:
    """Its classifier leaves with it, and so do its blocks with its content."""
    (case, *_) = xloras(*LLAMA)
    assert tokens(ask(llama_eager, [case])[0]) == case.answer
    assert llama_eager.llm_engine.remove_lora(case.adapter.lora_int_id)
    check([case], ask(llama_eager, [case]))
