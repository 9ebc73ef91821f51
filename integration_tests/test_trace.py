"""Traces over HTTP: what a running server says its gates decided, against transformers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from integration_tests import reference_model
from integration_tests.engines import FIXTURES, recorded
from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving, words
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.trace import Trace, record

pytestmark = pytest.mark.engine
FOLDERS = {name: recorded(f"{name}-a").folder for name in ("loramoe", "mixlora", "plain")}
FOLDERS["xlora"] = FIXTURES / "conditioned" / "xlora_lw_topk-a" / "adapter"  # two passes
# How a request asks for its trace.
TRACED: dict[str, Any] = {"vllm_xargs": {"lora_ext_trace": 1}}
SAID: dict[str, Any] = {"lora_ext": {"trace": True}}
BOUND = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_with_tokenizer(tmp_path_factory.mktemp("trace") / "base_llama")


@pytest.fixture(scope="module")
def by_name(base) -> Path:
    """A folder from which a resolver of vLLM's takes adapters by name."""
    folder = base.parent / "by_name"
    for name, source in (("found", "plain"), ("also-found", "loramoe"), ("broken", "plain")):
        shutil.copytree(FOLDERS[source], folder / name)
        path = folder / name / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
        path.write_text(json.dumps(config))
    weights = folder / "broken" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    return folder


@pytest.fixture(scope="module")
def server(base, by_name) -> Iterator[Server]:
    modules = [f"{name}={folder}" for name, folder in FOLDERS.items()]
    argv = command(
        base, free_port(), {"trace": True}, "--lora-modules", *modules, "--max-loras", "4",
        "--max-num-batched-tokens", "64",
    )  # fmt: skip
    resolving = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LORA_RESOLVER_CACHE_DIR": str(by_name),
    }  # fmt: skip
    with serving(argv, base.parent / "server.log", fork=True, **resolving) as running:
        yield running


def ask(server: Server, model: str, prompt: Any, **more: Any) -> Any:
    body = {
        "model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **more,
    }  # fmt: skip
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False)


def traced(server: Server, request_id: str, **query: int) -> httpx.Response:
    url = f"{server.url}/v1/lora_ext/trace/{request_id}"
    return httpx.get(url, params=query, timeout=60, trust_env=False)


def test_a_resolver_of_vllms_finds_adapters_by_name(server):
    """`lora_filesystem_resolver`: a plain adapter and a routed one, in one batch and by twos."""
    cases = [
        (name, fixture, i)
        for name, fixture in (("found", "plain-a"), ("also-found", "loramoe-a"), ("base", ""))
        for i in (1, 2)
    ]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            answers = pool.map(
                lambda case: ask(server, case[0], recorded(case[1] or "plain-a").prompts[case[2]]),
                cases,
            )
            for (name, fixture, i), answer in zip(cases, answers, strict=True):
                assert answer.status_code == 200, answer.text
                got = answer.json()["choices"][0]["token_ids"]
                if fixture:
                    assert got == recorded(fixture).greedy[i][: len(got)], name
    broken, unknown = (ask(server, name, [5, 6]) for name in ("broken", "nowhere"))
    assert (broken.status_code, unknown.status_code) == (400, 404), broken.text
    both = {"lora_ext": {"adapters": [{"name": "found"}, {"name": "also-found", "scale": 0.5}]}}
    assert ask(server, "base", [5, 6, 7], **both).status_code == 200


def test_a_trace_is_its_clients_own(server):
    """Two clients with keys of their own, who give their requests the same id."""

    def of(client: str) -> dict[str, str]:
        return {"authorization": f"Bearer {client}", "x-request-id": "mine"}

    for client, prompt in (("a", [5, 6, 7]), ("b", [8, 9])):
        body = {"model": "loramoe", "prompt": prompt, "max_tokens": 2, **TRACED}
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body, headers=of(client), timeout=60,
            trust_env=False,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
    url = f"{server.url}/v1/lora_ext/trace/{answer.json()['id']}"
    found = {c: httpx.get(url, headers=of(c), timeout=60, trust_env=False) for c in "abc"}
    assert Trace.from_json(found["a"].text).token_ids[:3] == [5, 6, 7]
    assert Trace.from_json(found["b"].text).token_ids[:2] == [8, 9]
    for answer in (found["c"], traced(server, "cmpl-mine")):
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")


def check(text: str, model: str, ids: list[int], prompt_tokens: int, name: str = "") -> float:
    """Largest difference of a gate from what transformers computes for the same tokens.

    Args:
        name: what the server calls the adapter; empty: as its folder here.
    """
    got = Trace.from_json(text)
    adapter = load_adapter(FOLDERS[model])
    want = record(reference_model.model("base_llama"), adapter, ids)
    assert (got.token_ids, got.prompt_tokens) == (ids, prompt_tokens)
    assert (got.adapter, got.system) == (name or model, adapter.system)
    assert list(got.weights) == list(want.weights)
    diffs = [(got.weights[n] - want.weights[n]).abs().max().item() for n in want.weights]
    assert all(diff < BOUND for diff in diffs)  # false for NaN: every token was computed
    return max(diffs, default=0.0)


def steady(model: str, length: int, seed: int) -> list[int]:
    adapter = load_adapter(FOLDERS[model])
    return reference_model.steady_prompt("base_llama", adapter, length, seed)


def test_traced_and_untraced_requests_in_one_batch(server):
    """Prompts of one chunk and of several; the second round could come from the prefix cache."""
    jobs = [
        (model, steady(model, length, seed), more)
        for seed, (model, length) in enumerate(
            [("loramoe", 9), ("mixlora", 90), ("loramoe", 70), ("xlora", 80)]
        )
        for more in (TRACED, SAID, {})
    ]
    jobs += [("plain", steady("plain", 20, 7), SAID), ("base", list(range(5, 40)), {})]
    worst = []
    for _ in range(2):
        with ThreadPoolExecutor(len(jobs)) as pool:
            sent = pool.map(lambda job: ask(server, job[0], job[1], **job[2]), jobs)
            answers = [answer.json() for answer in sent]
        for (model, prompt, more), answer in zip(jobs, answers, strict=True):
            found = traced(server, answer["id"])
            if not more:
                assert (found.status_code, found.json()["error"]["type"]) == (400, "not_traced")
                continue
            assert found.status_code == 200 and found.headers["content-type"] == "application/json"
            ids = prompt + answer["choices"][0]["token_ids"][:-1]
            worst.append(check(found.text, model, ids, len(prompt)))
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    said = re.findall(r'lora_ext:traced_expert_weight{adapter="loramoe",expert="(\d)"} (.*)', text)
    assert [float(weight) > 0 for _, weight in said] == [True] * len(said) and len(said) > 1
    print(f"max |gate difference| over {len(worst)} traces: {max(worst):.1e}")


def test_a_later_version_has_its_adapters_name(server):
    """Workers hold it under an id of its own; the trace and the metric call it as requests do."""
    for folder, more in (("mixlora", {}), ("loramoe", {"load_inplace": True})):
        body = {"lora_name": "turned", "lora_path": str(FOLDERS[folder]), **more}
        url = f"{server.url}/v1/load_lora_adapter"
        loaded = httpx.post(url, json=body, timeout=60, trust_env=False)
        assert loaded.status_code == 200, loaded.text
    prompt = steady("loramoe", 9, 41)
    answer = ask(server, "turned", prompt, **TRACED)
    assert answer.headers["x-lora-ext-version"] == loaded.headers["x-lora-ext-version"]
    ids = prompt + answer.json()["choices"][0]["token_ids"][:-1]
    found = traced(server, answer.json()["id"])
    check(found.text, "loramoe", ids, len(prompt), "turned")
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    said = re.findall(r'lora_ext:traced_expert_weight{adapter="(turned.*)",expert=".*"} (.*)', text)
    assert {name for name, _ in said} == {"turned"}
    want_E = sum(w_TE.abs().sum(0) for w_TE in Trace.from_json(found.text).weights.values())
    assert [float(weight) for _, weight in said] == pytest.approx(want_E.tolist(), rel=1e-3)


def test_prompts_and_choices_have_their_own_traces(server):
    prompts = [steady("loramoe", 8, 21), steady("loramoe", 5, 22)]
    answer = ask(server, "loramoe", prompts, temperature=2.0, n=2, **TRACED).json()
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == 4
    for choice in answer["choices"]:
        prompt, number = divmod(choice["index"], 2)
        found = traced(server, answer["id"], prompt=prompt, choice=number)
        ids = prompts[prompt] + choice["token_ids"][:-1]
        check(found.text, "loramoe", ids, len(prompts[prompt]))
    assert traced(server, answer["id"], prompt=2).status_code == 404
    assert traced(server, answer["id"], choice=2).status_code == 404


def test_wrong_requests(server):
    for request_id in ("cmpl-nope", ".*"):
        found = traced(server, request_id)
        assert (found.status_code, found.json()["error"]["type"]) == (404, "not_found")
    for more, words_of_it in (
        ({"vllm_xargs": {"lora_ext_trace": "perhaps"}}, "lora_ext_trace"),
        ({"lora_ext": {"trace": "perhaps"}}, "lora_ext.trace"),
    ):
        refused = ask(server, "loramoe", [5, 6], **more)
        assert refused.status_code == 400 and words_of_it in refused.text
    assert traced(server, "a", choice=-1).status_code in (400, 422)
    assert ask(server, "loramoe", [5, 6], **TRACED).status_code == 200


@pytest.mark.parametrize("how", [[], ["--chat"]])
def test_the_command_asks_the_server(server, base, tmp_path, how):
    prompt = steady("loramoe", 12, 31)
    done = subprocess.run(
        [sys.executable, "-m", "vllm_lora_ext.cli", "trace", "--url", server.url, "--base",
         str(base), "--model", "loramoe", "--prompt", words(prompt), "--new-tokens", "4",
         "--picture", str(tmp_path / "t.png"), "--out", str(tmp_path / "t.json"), "--json", *how],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["token_ids"][:12] == prompt and found["prompt_tokens"] == 12
    assert found["tokens"][:12] == words(prompt).split()
    check(done.stdout, "loramoe", found["token_ids"], 12)
    assert (tmp_path / "t.json").read_text() == done.stdout
    assert (tmp_path / "t.png").stat().st_size > 1000
