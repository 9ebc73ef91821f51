"""Base and adapters answer together, with the authors' numbers; answers and metrics name them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from integration_tests.one_server.asking import (
    BOUND,
    MOE,
    PLAIN,
    ask,
    counters,
    listed,
    load,
    names,
    of_its_own,
    post,
    unload,
    worst_prompt,
)
from integration_tests.server import words
from scripts.dashboard import metric_names

pytestmark = pytest.mark.engine


def test_lists_base_and_adapters(client):
    assert {"base", "plain", "loramoe"} <= names(client)
    assert {c.id: c.parent for c in client.models.list() if c.id == "plain"} == {"plain": "base"}


def test_concurrent_mix_gives_the_authors_numbers(client):
    """Base and both adapters in flight together, twice: the second time from the prefix cache."""
    jobs = [
        (model, prompt, greedy, wanted)
        for i in range(len(PLAIN.prompts))
        for model, prompt, greedy, wanted in (
            ("plain", PLAIN.prompts[i], PLAIN.greedy[i], PLAIN.logits[i]),
            ("base", PLAIN.prompts[i], None, PLAIN.base_logits[i]),
            ("loramoe", MOE.prompts[i], MOE.greedy[i], MOE.logits[i]),
        )
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        scored = list(
            pool.map(lambda j: ask(of_its_own(client), j[0], j[1], prompt_logprobs=5), jobs)
        )
        again = list(pool.map(lambda j: ask(of_its_own(client), j[0], j[1]), jobs))
    diffs = [worst_prompt(c, j[3]) for c, j in zip(scored, jobs, strict=True)]
    print(f"max |dlogp| plain {max(diffs[0::3]):.1e}, base {max(diffs[1::3]):.1e}, "
          f"loramoe {max(diffs[2::3]):.1e}")  # fmt: skip
    assert max(diffs) < BOUND
    for first, second, (_, _, greedy, wanted) in zip(scored, again, jobs, strict=True):
        assert first.token_ids == second.token_ids
        assert first.token_ids[0] == wanted[-1].argmax().item()
        top = torch.log_softmax(wanted[-1].double(), -1).max().item()
        assert abs(second.logprobs.token_logprobs[0] - top) < BOUND
        assert greedy is None or first.token_ids == greedy


@pytest.mark.parametrize(("model", "fx"), [("plain", PLAIN), ("loramoe", MOE)])
def test_text_and_chat(client, model, fx):
    for prompt, greedy in zip(fx.prompts, fx.greedy, strict=True):
        assert ask(client, model, words(prompt)).token_ids == greedy
        half = len(prompt) // 2
        chat = client.chat.completions.create(
            model=model, max_tokens=12, temperature=0,
            messages=[
                {"role": "user", "content": words(prompt[:half])},
                {"role": "user", "content": words(prompt[half:])},
            ],
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        assert chat.choices[0].token_ids == greedy
        assert chat.choices[0].message.content.split() == words(greedy).split()


def test_streams(client):
    got: list[int] = []
    for event in client.completions.create(
        model="loramoe", prompt=MOE.prompts[1], max_tokens=12, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ):  # fmt: skip
        got += event.choices[0].token_ids or []
    assert got == MOE.greedy[1]


@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_every_answer_says_which_version_gave_it(server, route):
    said = {
        "completions": {"prompt": "t1"}, "responses": {"input": "t1"},
        "chat/completions": {"messages": [{"role": "user", "content": "t1"}]},
    }[route]  # fmt: skip
    version = listed(server, "plain")["version"]
    for model, wanted in (("plain", version), ("base", None)):
        answer = post(server, route, model=model, max_tokens=2, headers={}, **said)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-lora-ext-version") == wanted
        fingerprint = answer.json().get("system_fingerprint")
        if route != "responses":
            assert fingerprint.endswith(f"-{version}") == (wanted is not None)


def test_the_engines_numbers_stand_on_metrics(server, client, places):
    """What went into slots and what clients were refused; every name of the dashboard is there."""
    before = counters(server)
    assert before["lora_ext:slots"] == 2 >= before["lora_ext:slots_used"]
    assert load(server, "seen", places.adapters / "native").status_code == 200
    assert load(server, "unseen", places.adapters / "none").status_code == 404
    # Two slots: whatever they hold before, the last three find their own taken.
    for model in ("plain", "loramoe", "seen", "plain", "loramoe"):
        ask(client, model, PLAIN.prompts[0], 2)  # at its second it is said to run
    after = counters(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["lora_ext:activations_total"] >= 3
    assert grown["lora_ext:adapter_steps_total"] >= 5
    assert grown["lora_ext:activation_bytes_total"] > 0
    assert grown["lora_ext:load_seconds_count"] == 1
    assert grown['lora_ext:refusals_total{code="not_found"}'] == 1
    assert 0 < after["lora_ext:resident_bytes"] <= after["lora_ext:limit_bytes"]
    assert unload(server, "seen").status_code == 200
    assert counters(server)["lora_ext:resident_bytes"] < after["lora_ext:resident_bytes"]
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    there = set(re.findall(r"^([a-z_]+:\w+)", text, re.MULTILINE))
    there.add("lora_ext:traced_expert_weight")  # once there is a trace
    assert metric_names() <= there, metric_names() - there
    routed_by = re.findall(r'lora_requests_info{[^}]*running_lora_adapters="([^"]*)"', text)
    assert {"plain", "loramoe"} <= set(",".join(routed_by).split(","))  # docs/fleet.md
