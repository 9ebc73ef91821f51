"""Adapters that are made for a request: users' (RecLoRA) and instructions' (WavLLM), offline."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from integration_tests.conditioned import (
    IMAGES,
    USERS,
    WAVLLM,
    Case,
    adapter,
    ask,
    check,
    check_beginnings,
    check_no_block_is_stale,
    fixture,
    images,
    instructions,
    parts,
    preempted,
    users,
)
from integration_tests.engines import base_path
from integration_tests.followed import instructed
from integration_tests.matrix import WHERE
from integration_tests.reference_model import logits, model
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.verify import load_base

pytestmark = pytest.mark.engine


def base() -> list[Case]:
    _, numbers = fixture(WAVLLM)
    prompt, logits = numbers["prompt_0"].tolist(), numbers["base_logits_0"][-1:]
    return [Case("base", prompt, [int(logits[0].argmax())], logits)]


def test_the_authors_numbers_in_one_batch(llama_mha: Any) -> None:
    """Four times as many users and instructions as slots, with images and base requests."""
    cases = [*users(), *instructions(), *images()[:2], *base()]
    shuffled = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
    check(shuffled, ask(llama_mha, shuffled, skip_reading_prefix_cache=True))
    check(shuffled, ask(llama_mha, shuffled))
    check(shuffled, ask(llama_mha, shuffled))  # from the prefix cache
    for case in (*instructions()[:2], *users()[::7]):  # alone
        check([case], ask(llama_mha, [case], skip_reading_prefix_cache=True))


def test_after_a_preemption(llama_mha: Any) -> None:
    cases = [*instructions()[:3], *users()[::6], *base()]
    check_beginnings(cases, preempted(llama_mha, cases))


def test_an_instruction_longer_than_a_chunk(llama_mha: Any) -> None:
    """150 tokens in steps of 64, between the rows of other requests; the answers of both."""
    ids = [int(t) for t in np.random.default_rng(3).integers(4, 150, 150)]
    prompt = ids[:40]
    template = load_adapter(adapter(WAVLLM).lora_path, head_size=32).template
    wanted = instructed(model("base_llama_mha"), template, ids)
    want = logits("base_llama_mha", wanted, prompt)
    long = Case(
        "long", prompt, [int(want[-1].argmax())], want[-1:], adapter(WAVLLM),
        {"instruction": {"ids": ids}},
    )  # fmt: skip
    for cases in ([long], [*instructions(), long, *users()[:5], *base()]):
        check(cases, ask(llama_mha, cases, skip_reading_prefix_cache=True))


def test_a_rotation_of_users_over_few_slots(llama_mha: Any) -> None:
    """Sixty users twice, a thousand where `make matrix` asks, over four slots; every answer is the
    one of its own vector."""
    _, numbers = fixture("reclora-a")
    prompt = numbers["prompt_1"].tolist()
    template = load_adapter(adapter("reclora-a").lora_path).template
    net, rng, cases = load_base(base_path("base_llama_mha")), np.random.default_rng(4), []
    for i in range(1000 if WHERE in os.environ else 60):
        user = [float(np.float32(x)) for x in rng.normal(size=template.user)]
        with (
            torch.inference_mode(),
            apply_adapter(net, template.derive(torch.tensor(user), None)),
        ):
            logits = net(torch.tensor([prompt])).logits[0, -1:]
        answer = [int(logits[0].argmax())]
        cases.append(
            Case(f"user {i}", prompt, answer, logits, adapter("reclora-a"), {"user": user})
        )
    for _ in range(2):
        order = [cases[i] for i in rng.permutation(len(cases))]
        check(order, ask(llama_mha, order))


def drawn(rng: np.random.Generator, prompt: list[int]) -> Case:
    """Any request over a prompt: base, a user, an instruction, images, or several at once."""
    kind = str(rng.choice(["base", *USERS, WAVLLM, IMAGES, "mix", "mix", "mix"]))
    own, says = None, {}
    names = [kind]
    if kind == "mix":  # with one of the user's adapters: they are of several lengths
        said = parts(rng, [str(rng.choice(USERS)), WAVLLM, IMAGES], len(prompt), "image")
        says["adapters"], names = said, [part["name"] for part in said]
    elif kind != "base":
        own = adapter(kind)
    for name in {*names} & {*USERS}:
        _, numbers = fixture(name)
        says["user"] = numbers[f"user_vec_u{rng.integers(3)}"].tolist()
    if WAVLLM in names:
        _, numbers = fixture(WAVLLM)
        says["instruction"] = {"ids": numbers[f"gate_ids_{rng.integers(2)}"].tolist()}
    if IMAGES in names or any("modality" in part for part in says.get("adapters", ())):
        bounds = [sorted(rng.integers(0, len(prompt), 2).tolist()) for _ in range(2)]
        says["modality_spans"] = {"image": bounds}
    return Case(f"{kind} {says}", prompt, [0] * 4, torch.empty(0, 160), own, says)


def test_no_block_is_stale(llama_mha: Any) -> None:
    for name in (*USERS, WAVLLM, IMAGES):
        llama_mha.llm_engine.add_lora(adapter(name))
    rng = np.random.default_rng(6)
    text = [int(t) for t in rng.integers(4, 160, 160)]
    assert check_no_block_is_stale(llama_mha, rng, text, drawn) > 1000


@pytest.mark.parametrize(
    ("name", "says", "code"),
    [
        ("reclora-a", {}, "bad_value"),
        ("reclora-a", {"user": [0.5] * 19}, "bad_value"),
        ("reclora-a", {"user": [float("nan")] * 20}, "bad_value"),
        ("reclora-a", {"user": [1e39] * 20}, "bad_value"),
        ("reclora-a", {"user": [0.5] * 20, "instruction": {"ids": [5]}}, "bad_value"),
        (WAVLLM, {"instruction": {"ids": []}}, "bad_value"),
        (WAVLLM, {"instruction": {"ids": [160]}}, "bad_value"),
        (WAVLLM, {"instruction": {"ids": [5] * 300}}, "bad_value"),
        (WAVLLM, {"instruction": {"ids": [5]}, "user": [1.0]}, "bad_value"),
    ],
)
def test_what_a_request_says_wrongly(
    llama_mha: Any, name: str, says: dict[str, Any], code: str
) -> None:
    before = instructions()[0]
    with pytest.raises(Exception) as caught:
        ask(llama_mha, [Case("", [5, 6, 7], [0], torch.empty(0, 160), adapter(name), says)])
    error = AdapterError.parse(str(caught.value))
    assert error is not None, caught.value
    assert error.code == code, error.text
    check([before], ask(llama_mha, [before]))
