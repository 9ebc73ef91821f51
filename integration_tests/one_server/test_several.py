"""Several adapters in one request, on every route that takes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from integration_tests.one_server.asking import (
    BOUND,
    PLAIN,
    ask,
    counters,
    fingerprint,
    load,
    names,
    of_its_own,
    send,
    unload,
    worst_prompt,
)
from integration_tests.recorded_requests import conditioned, examples
from integration_tests.server import Server, words

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def mixed(server, places) -> Iterator[dict[str, Any]]:
    """The fixtures of several adapters in one request, their adapters loaded: name → fixture."""
    fixtures = {name: conditioned(name) for name in ("scales-a", "spans-a")}
    adapters = [(f"{name}-{a.name}", a) for name, fx in fixtures.items() for a in fx.adapters]
    for name, folder in adapters:
        shutil.copytree(folder, places.adapters / name)
        assert load(server, name, places.adapters / name).status_code == 200
    yield fixtures
    for name, _ in adapters:
        assert unload(server, name).status_code == 200


def said_in(fixture: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The field, with the names under which the fixture's adapters are loaded."""
    named = [{**a, "name": f"{fixture.name}-{a['name']}"} for a in request["adapters"]]
    return {"adapters": named}


def test_several_adapters_in_one_request(client, mixed):
    """Scales and spans, all at once beside plain, routed and base requests; then again."""
    jobs = [(fx, request) for fx in mixed.values() for request in fx.requests]
    before, models = fingerprint(client), names(client)

    def send(job: tuple[Any, dict[str, Any]], text: bool, **more: Any) -> Any:
        fx, request = job
        said = said_in(fx, request)
        extra = {"vllm_xargs": {"lora_ext": json.dumps(said)}} if text else {"lora_ext": said}
        prompt = fx.prompt(request)
        return ask(of_its_own(client), "base", prompt, **extra, **more)

    with ThreadPoolExecutor(len(jobs) + 1) as pool:
        neighbour = pool.submit(fingerprint, of_its_own(client))
        first = list(pool.map(lambda job: send(job, False, prompt_logprobs=5), jobs))
        again = list(pool.map(lambda job: send(job, True), jobs))
    diffs = [worst_prompt(c, fx.logits(r)) for c, (fx, r) in zip(first, jobs, strict=True)]
    print(f"max |dlogp| {max(diffs):.1e}")
    assert max(diffs) < BOUND
    for one, two, (fx, request) in zip(first, again, jobs, strict=True):
        assert one.token_ids == two.token_ids == fx.greedy(request)
    assert neighbour.result() == fingerprint(client) == before
    assert names(client) == models, "derived adapters are no models"


def test_routes_that_are_not_openais(server, mixed):
    """Anthropic's messages, and tokens in, tokens out."""
    for fx in mixed.values():
        for request in fx.requests:
            said, prompt, greedy = said_in(fx, request), fx.prompt(request), fx.greedy(request)
            parameters = {"max_tokens": len(greedy), "temperature": 0, "ignore_eos": True}
            tokens = {"model": "base", "token_ids": prompt}
            for body in (
                {"lora_ext": said, "sampling_params": parameters},
                {"sampling_params": {**parameters, "extra_args": {"lora_ext": said}}},
            ):
                answer = send(server, "inference/v1/generate", {**tokens, **body})
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["token_ids"] == greedy
            messages = {
                "model": "base", "max_tokens": len(greedy), "temperature": 0, "lora_ext": said,
                "messages": [{"role": "user", "content": words(prompt)}],
            }  # fmt: skip
            answer = send(server, "v1/messages", messages)
            assert answer.status_code == 200, answer.text
            said_words = [w for w in words(greedy).split() if w != "t0"]  # a special token
            assert answer.json()["content"][0]["text"].split() == said_words


@pytest.mark.parametrize("route", ["v1/messages", "inference/v1/generate"])
def test_routes_that_are_not_openais_refuse_too(server, client, mixed, route):
    body = {
        "v1/messages": {"messages": [{"role": "user", "content": "t1"}], "max_tokens": 1},
        "inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 1}},
    }[route]
    before = fingerprint(client)
    for model, said, words_of_it in (
        ("base", {"adapters": [{"name": "none"}]}, "lora_ext.adapters[0].name"),
        ("base", {"adapter": []}, "lora_ext.adapter is unknown"),
        ("plain", {"user": [0.5]}, "lora_ext.user has no use here"),
    ):
        for stream in (False, True):
            answer = send(
                server, route, {**body, "model": model, "lora_ext": said, "stream": stream}
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "bad_value")
            assert words_of_it in error["message"], error
    assert fingerprint(client) == before


COUNTERS = (
    "lora_ext:derived_adapters_made_total", "lora_ext:derived_adapters_hit_total",
    "lora_ext:derived_adapters_evicted_total", "lora_ext:gate_passes_total",
)  # fmt: skip


def test_derived_adapters_are_counted(server, client, mixed):
    fx = mixed["scales-a"]
    said = {"adapters": [{"name": "scales-a-red", "scale": 0.123}]}
    before = counters(server)
    for _ in range(3):
        ask(client, "base", fx.prompt(fx.requests[0]), 1, lora_ext=said)
    made, hit = (counters(server)[n] - before[n] for n in COUNTERS[:2])
    assert (made, hit) == (1, 2)
    assert set(COUNTERS) <= set(counters(server))


def holdings(server: Server) -> tuple[Any, float]:
    """What the server says that it holds."""
    answer = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    return answer.json(), counters(server)["lora_ext:resident_bytes"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses"])
def test_a_field_that_is_wrong_is_400_and_touches_nobody(server, client, mixed, route, stream):
    prompt = {
        "completions": {"prompt": PLAIN.prompts[0]},
        "chat/completions": {"messages": [{"role": "user", "content": "t1"}]},
        "responses": {"input": "t1"},
    }[route]
    before, held = fingerprint(client), holdings(server)
    red = "scales-a-red"
    for model, said, words_of_it in (
        ("base", {"adapters": [{"name": "none"}]}, "lora_ext.adapters[0].name"),
        ("plain", {"adapters": [{"name": red}]}, "not the base model"),
        ("base", {"adapters": [{"name": red, "scale": "NaN"}]}, "lora_ext.adapters[0].scale"),
        ("base", {"adapters": [{"name": red, "scale": 10_001}]}, "lora_ext.adapters[0].scale"),
        ("base", {"adapters": [{"name": red, "spans": [[9, 2]]}]}, "lora_ext.adapters[0].spans[0]"),
        ("base", {"adapters": [{"name": red, "spans": [[256, 999]]}]}, "is outside of every"),
        ("base", {"adapters": [{"name": red}] * 9}, "max_request_adapters 8"),
        ("base", {"adapter": []}, "lora_ext.adapter is unknown"),
        ("plain", {"user": [0.5]}, "lora_ext.user has no use here"),
        ("base", {"user": [0.5] * 1_000_000}, "too large"),
    ):
        body = {"model": model, "lora_ext": said, "stream": stream, **prompt}
        answer = httpx.post(f"{server.url}/v1/{route}", json=body, timeout=60, trust_env=False)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (400, "bad_value", "lora_ext")
        assert words_of_it in error["message"], error
    assert (fingerprint(client), holdings(server)) == (before, held)


def test_the_page_of_requests_is_true(client, mixed):
    """Its examples of a client, with the names of the fixture's adapters."""
    fx = mixed["scales-a"]
    for block in examples("requests.md", "client"):
        for name in ("red", "green"):
            block = block.replace(f'"{name}"', f'"scales-a-{name}"')
        scope: dict[str, Any] = {"client": client, "prompt": fx.prompt(fx.requests[0])}
        exec(compile(block, "docs/requests.md", "exec"), scope)
        assert scope["answer"].choices[0].finish_reason == "length"
