"""The demo's model in bfloat16, end to end: greedy text against transformers.

transformers computes the same bfloat16 weights in float32. bfloat16 keeps eight bits, so at the
size of these logits (16 to 32) a step is 0.125, and thirty layers of rounding come to a few steps.
Where transformers' best token beats the engine's by less than `BOUND` the two are tied for this
test; past such a place the texts are not compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from integration_tests.engines import close, greedy, lora, make_engine, run, tokens
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.registry import load_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
BOUND = 0.35  # logits, three steps; the demo's answers are decided by 3 to 20
ITEMS, TOKENS = 4, 14


@pytest.fixture(scope="module")
def demo():
    """The examples' modules, as `make demo` imports them."""
    sys.path.insert(0, str(EXAMPLES))
    import smollm
    import tasks

    yield smollm, tasks
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def llm(demo):
    smollm, _ = demo
    llm = make_engine(
        smollm.ensure_base(), dtype="bfloat16", max_model_len=128, max_num_seqs=32,
        max_num_batched_tokens=1024, skip_tokenizer_init=False,
    )  # fmt: skip
    yield llm
    close(llm)


def test_greedy_text_equals_transformers(demo, llm):
    smollm, tasks = demo
    model, tokenizer = smollm.load(torch.float32)
    names = [*tasks.TASKS, "routed"]
    folders = {name: tasks.ADAPTERS / name for name in names}
    requests = [
        (smollm.prompt_ids(tokenizer, item.question), name)
        for task in tasks.TASKS
        for item in tasks.held_out(task, ITEMS)
        for name in (None, *names)
    ]
    asked = [(p, n and lora(n, folders[n])) for p, n in requests]
    answers = [until_end(tokens(o), tokenizer) for o in run(llm, asked, greedy(TOKENS))]
    adapters = {name: load_adapter(folders[name]) for name in names}
    gaps = {
        (name, tokenizer.decode(prompt), tokenizer.decode(answer)): first_difference(
            model, adapters.get(name), prompt, answer
        )
        for (prompt, name), answer in zip(requests, answers, strict=True)
    }
    same = sum(gap == 0 for gap in gaps.values())
    print(f"{same} of {len(gaps)} texts equal, largest gap at a parting {max(gaps.values()):.2f}")
    assert [k for k, gap in gaps.items() if gap >= BOUND] == []
    assert same >= 0.85 * len(gaps)


@pytest.mark.parametrize("kind", ["Plain", "Routed"])
def test_two_steps_of_the_training_loop(demo, llm, kind, monkeypatch):
    """`make rl` in short: the loop asserts of every answer that its version is the one asked."""
    import rl_loop
    import rl_policies

    monkeypatch.setattr(rl_loop, "QUESTIONS", 3)
    monkeypatch.setattr(rl_loop, "GROUP", 4)
    policy = rl_policies.Plain(warm=1) if kind == "Plain" else rl_policies.Routed()
    curve = rl_loop.learn(llm, policy, steps=2, exam_every=1, exam_items=2)
    exams = 3 * 2 * len(policy.tasks)
    assert curve["answers"] == 2 * 3 * 4 + exams and list(curve["exam"]) == [0, 1, 2]
    assert len(curve["reward"]) == 2 and 1 <= len(curve["distance"]) <= 2


def until_end(answer: list[int], tokenizer) -> list[int]:
    """What a user sees; past the end mark the model is at a loss and every token a near tie."""
    end = tokenizer.eos_token_id
    return answer[: answer.index(end) + 1] if end in answer else answer


def first_difference(model, adapter, prompt: list[int], answer: list[int]) -> float:
    """By how much transformers prefers its own token where the texts part; 0 when they don't."""
    applied = apply_adapter(model, adapter) if adapter else None
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    if applied:
        applied.remove()
    best = logits.argmax(-1)
    parted = [i for i, token in enumerate(answer) if int(best[i]) != token]
    if not parted:
        return 0.0
    at = parted[0]
    return (logits[at].max() - logits[at, answer[at]]).item() or 1e-6
