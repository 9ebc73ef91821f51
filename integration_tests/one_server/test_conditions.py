"""Adapters that a request completes: where they begin, their gates, scores of labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from integration_tests.conditioned import Case, aloras, chain, fixture
from integration_tests.engines import FIXTURES
from integration_tests.matrix import http_error
from integration_tests.one_server.asking import (
    BOUND,
    ask,
    fingerprint,
    load,
    of_its_own,
    unload,
    worst_prompt,
)
from integration_tests.recorded_requests import conditioned, examples
from integration_tests.server import words
from vllm_lora_ext.cli import app

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def activated(server, places) -> Iterator[list[Case]]:
    """The fixtures of Activated LoRA, loaded."""
    cases = [*aloras(), *chain(0), *chain(1)]
    adapters = {c.adapter.lora_name: c.adapter.lora_path for c in cases if c.adapter is not None}
    assert len(adapters) == 3
    for name, folder in adapters.items():
        shutil.copytree(folder, places.adapters / name)
        assert load(server, name, places.adapters / name).status_code == 200
    yield cases
    for name in adapters:
        assert unload(server, name).status_code == 200


def test_activated_loras(client, activated):
    """In flight together over two slots, and again from the prefix cache that they share."""

    def send(case: Case) -> float:
        model = "base" if case.adapter is None else case.adapter.lora_name
        choice = ask(of_its_own(client), model, case.prompt, len(case.answer))
        return http_error(case, choice.model_dump())

    for _ in range(2):
        with ThreadPoolExecutor(len(activated)) as pool:
            errors = dict(zip((c.key for c in activated), pool.map(send, activated), strict=True))
        print(f"Activated LoRA: max |dlogp| {max(errors.values()):.1e}")
        assert max(errors.values()) < BOUND, errors


def test_an_invocation_that_only_the_chat_template_brings(client, activated):
    case = activated[3]
    said, ending = words(case.prompt[:61]), words(case.prompt[61:])
    assert case.key == "alora-a 3" and case.prompt[61:] == [11, 12, 13]

    def send(model: str, **more: Any) -> Any:
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": said}], max_tokens=12,
            temperature=0, logprobs=True, extra_body={
                "ignore_eos": True, "return_token_ids": True, "chat_template_kwargs": more,
            },
        ).choices[0]  # fmt: skip

    choice = send("alora-a", ending=ending)
    found = {"token_logprobs": [token.logprob for token in choice.logprobs.content]}
    assert http_error(case, {"token_ids": choice.token_ids, "logprobs": found}) < BOUND
    without, base = (send(model) for model in ("alora-a", "base"))
    assert without.token_ids == base.token_ids
    assert [t.logprob for t in without.logprobs.content] == pytest.approx(
        [t.logprob for t in base.logprobs.content], abs=1e-4
    )


@pytest.fixture(scope="module")
def library(server, places) -> Iterator[str]:
    """The adapters of a fixture as one, whose gates come with each request."""
    folders = conditioned("scales-a").adapters
    named = [word for folder in folders for word in ("--adapter", f"{folder.name}={folder}")]
    out = places.adapters / "library"
    made = CliRunner().invoke(app, ["bundle", *named, "--router", "request", "--out", str(out)])
    assert made.exit_code == 0, made.output
    assert load(server, "library", out).status_code == 200
    yield "library"
    assert unload(server, "library").status_code == 200


def test_gates_that_come_with_the_request(client, library):
    """Weights of a library's experts are scales of its adapters: the fixture's numbers, all in
    flight at once and again from the prefix cache, by name and by number."""
    fx = conditioned("scales-a")
    order = [folder.name for folder in fx.adapters]
    gates = [{a["name"]: a["scale"] for a in request["adapters"]} for request in fx.requests]
    numbered = [{str(order.index(name)): w for name, w in g.items()} for g in gates]

    def send(job: tuple[dict[str, Any], dict[str, Any]], **more: Any) -> Any:
        request, said = job
        return ask(
            of_its_own(client), library, fx.prompt(request), lora_ext={"gates": said}, **more
        )

    with ThreadPoolExecutor(len(gates)) as pool:
        jobs = list(zip(fx.requests, gates, strict=True))
        first = list(pool.map(lambda job: send(job, prompt_logprobs=5), jobs))
        again = list(pool.map(send, zip(fx.requests, numbered, strict=True)))
    diffs = [worst_prompt(c, fx.logits(r)) for c, r in zip(first, fx.requests, strict=True)]
    print(f"gates of a request: max |dlogp| {max(diffs):.1e}")
    assert max(diffs) < BOUND
    for one, two, request in zip(first, again, fx.requests, strict=True):
        assert one.token_ids == two.token_ids == fx.greedy(request)


def test_gates_that_are_wrong(server, client, library):
    before = fingerprint(client)
    for model, said, words_of_it in (
        (library, {"gates": {"red": 1, "pink": 1}}, "lora_ext.gates.pink is no expert of library"),
        (library, {"gates": {"0": 1, "blue": 1}}, "is said twice, by name and by number"),
        (library, {"gates": {"red": "much"}}, "lora_ext.gates.red"),
        (library, {"gates": {"red": 1e999}}, "lora_ext.gates.red"),
        (library, {"gates": [1, 2]}, "lora_ext.gates"),
        (library, {}, "lora_ext.gates is missing: adapter library needs it"),
        (library, None, "lora_ext.gates is missing: adapter library needs it"),
        ("plain", {"gates": {"red": 1}}, "lora_ext.gates has no use here"),
    ):
        body = {"model": model, "prompt": [5, 6], "max_tokens": 1, "lora_ext": said}
        url = f"{server.url}/v1/completions"
        answer = httpx.post(url, content=json.dumps(body), timeout=60, trust_env=False, headers={
            "Content-Type": "application/json"
        })  # fmt: skip
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "bad_value"), answer.text
        assert words_of_it in error["message"], error
    assert fingerprint(client) == before


def test_the_page_of_labels_is_true(server, client, places):
    """Its example of a client gives Menta's numbers."""
    meta, numbers = fixture("menta-a")
    folder = shutil.copytree(
        FIXTURES / "conditioned" / "menta-a" / "adapter", places.adapters / "menta"
    )
    assert load(server, "menta", folder).status_code == 200
    (block,) = examples("rewards_and_labels.md", "labels")
    for task in meta["tasks"]:
        for said in task["prompts"]:
            key = said["prompt"]
            scope: dict[str, Any] = {
                "client": client, "model": "menta", "labels": task["labels"],
                "prompt": numbers[f"prompt_{key}"].tolist(),
            }  # fmt: skip
            exec(compile(block, "docs/rewards_and_labels.md", "exec"), scope)
            got = torch.tensor([t for label in scope["tokens"] for t in label])
            assert (got - numbers[f"token_logprobs_{key}"]).abs().max() < BOUND
            assert scope["best"] == said["argmax_first_token"]
    assert unload(server, "menta").status_code == 200
