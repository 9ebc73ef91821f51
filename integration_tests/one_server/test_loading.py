"""Adapters are loaded, replaced, rolled back and unloaded while the server answers."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import NotFoundError

from integration_tests.one_server.asking import (
    BOUND,
    MOE,
    PLAIN,
    ask,
    listed,
    load,
    names,
    of_its_own,
    post,
    refused,
    unload,
    version_of,
)
from integration_tests.reference_model import logits, scaled
from integration_tests.server import Server, in_flight, paused
from tests.bad_adapters import GOOD, build_bad
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("folder", "fx"), [("native", MOE), ("plain", PLAIN), ("loramoe", MOE)])
def test_load_unload_and_load_again(server, client, places, folder, fx):
    name = f"late-{folder}"
    refused(client, name)
    for _ in range(2):
        answer = load(server, name, places.adapters / folder)
        assert answer.status_code == 200, answer.text
        assert name in names(client)
        assert load(server, name, places.adapters / folder).status_code == 400  # loaded already
        for prompt, greedy in zip(fx.prompts, fx.greedy, strict=True):
            assert ask(client, name, prompt).token_ids == greedy
        assert unload(server, name).status_code == 200
        assert name not in names(client)
        refused(client, name)
        assert unload(server, name).status_code == 404


def test_another_adapter_behind_the_same_name_and_path(server, client, places):
    """Never answered from the KV of the weights before; loaded by unload + load and in place."""
    moving = places.adapters / "moving"
    for turn in range(6):
        fx = (PLAIN, MOE)[turn % 2]
        shutil.rmtree(moving, ignore_errors=True)
        shutil.copytree(fx.folder, moving)
        if turn == 3:
            assert unload(server, "moving").status_code == 200
        answer = load(server, "moving", moving, load_inplace=turn not in (0, 3))
        assert answer.status_code == 200, answer.text
        assert ask(client, "moving", PLAIN.prompts[2]).token_ids == (
            PLAIN.greedy[2] if turn % 2 == 0 else ask(client, "loramoe", PLAIN.prompts[2]).token_ids
        )
    # Loaded in place once, not with every request: the files are not needed any more.
    shutil.rmtree(moving)
    assert ask(client, "moving", MOE.prompts[1]).token_ids == MOE.greedy[1]
    assert unload(server, "moving").status_code == 200


def streaming(server: Server, model: str, prompt: list[int], n: int) -> Iterator[Any]:
    """The version that the header names before the first token, then the tokens as they come."""
    body = {"model": model, "prompt": prompt, "stream": True, "max_tokens": n, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False
    ) as stream:
        yield stream.headers["x-lora-ext-version"]
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    yield from choice.get("token_ids") or []


def streamed(server: Server, model: str, prompt: list[int], n: int) -> tuple[str, list[int]]:
    """The version, and all tokens."""
    version, *tokens = streaming(server, model, prompt, n)
    return version, tokens


def test_the_list_counts_requests_in_flight(server, places):
    """Of the adapter that they name; no route pins one."""
    prompt, n = PLAIN.prompts[0], len(PLAIN.greedy[0])
    version = version_of(load(server, "busy", places.adapters / "plain"))
    with ThreadPoolExecutor(2) as pool:
        with paused(server) as wait_for:
            running = [pool.submit(streamed, server, "busy", prompt, n) for _ in range(2)]
            wait_for({"busy"}, 2)
            assert in_flight(server, {"plain"}) == 0
        assert [job.result() for job in running] == [(version, PLAIN.greedy[0])] * 2
    row = listed(server, "busy")
    assert [row[key] for key in ("version", "in_flight", "pinned", "residency")] == [
        version, 0, False, "slot",
    ]  # fmt: skip
    assert unload(server, "busy").status_code == 200


def test_replaced_while_it_answers(server, client, places):
    """Streams go on while the adapter is replaced: each is all of the version it names."""
    prompt, n, stop = PLAIN.prompts[0], 40, threading.Event()
    first = version_of(load(server, "live", places.adapters / "plain"))
    seen = [streamed(server, "live", prompt, n)]

    def streams() -> None:
        while not stop.is_set():
            seen.append(streamed(server, "live", prompt, n))

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(streams) for _ in range(3)]
        try:
            loaded = load(server, "live", places.adapters / "loramoe", expected_version=first)
            second = version_of(loaded)
            seen.append(streamed(server, "live", prompt, n))
        finally:
            stop.set()
        for job in running:
            job.result()
    wanted = {first: ask(client, "plain", prompt, n).token_ids,
              second: ask(client, "loramoe", prompt, n).token_ids}  # fmt: skip
    assert first != second and wanted[first] != wanted[second]
    assert {version for version, _ in seen} == {first, second}
    assert all(tokens == wanted[version] for version, tokens in seen)
    row = listed(server, "live")
    assert (row["version"], row["system"], row["in_flight"]) == (second, "loramoe", 0)
    assert row["older"] == [{"version": first, "in_flight": 0}]
    conflict = load(server, "live", places.adapters / "plain", expected_version=first)
    assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "version_conflict")
    back = post(server, "lora_ext/rollback", lora_name="live", version=first)
    assert version_of(back) == first
    assert ask(client, "live", PLAIN.prompts[0]).token_ids == PLAIN.greedy[0]
    assert {c.root for c in client.models.list() if c.id == "live"} == {f"{places.adapters}/plain"}
    gone = post(server, "lora_ext/rollback", lora_name="live", version="0" * 64)
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found")
    late = post(
        server, "lora_ext/rollback", lora_name="live", version=second, expected_version=second
    )
    assert (late.status_code, late.json()["error"]["type"]) == (409, "version_conflict")
    assert unload(server, "live").status_code == 200


def test_of_two_loaders_at_once_one_wins(server, client, places):
    """Both have seen the same version, and each means to replace it."""
    paths = {"plain": places.adapters / "plain", "loramoe": places.adapters / "loramoe"}
    version = version_of(load(server, "raced", places.adapters / "native"))
    wanted = {name: ask(client, name, PLAIN.prompts[0]).token_ids for name in paths}
    won = []
    for _ in range(4):
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(
                lambda path, seen=version: load(
                    server, "raced", path, load_inplace=True, expected_version=seen
                ), paths.values(),
            ))  # fmt: skip
        statuses = [answer.status_code for answer in answers]
        assert sorted(statuses) == [200, 409], [answer.text for answer in answers]
        winner = statuses.index(200)
        lost = answers[1 - winner].json()["error"]
        assert lost["type"] == "version_conflict", lost
        won.append([*paths][winner])
        assert ask(client, "raced", PLAIN.prompts[0]).token_ids == wanted[won[-1]]
        assert listed(server, "raced")["version"] == version_of(answers[winner])
        version = version_of(load(server, "raced", places.adapters / "native", load_inplace=True))
    assert unload(server, "raced").status_code == 200


def test_an_unload_of_another_version_takes_nothing_away(server, client, places):
    first = version_of(load(server, "parting", places.adapters / "plain"))
    second = version_of(load(server, "parting", places.adapters / "loramoe", load_inplace=True))
    conflict = unload(server, "parting", expected_version=first)
    assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "version_conflict")
    assert ask(client, "parting", MOE.prompts[0]).token_ids == MOE.greedy[0]
    row = listed(server, "parting")
    assert (row["version"], row["residency"]) == (second, "slot")
    assert unload(server, "parting", expected_version=second).status_code == 200
    refused(client, "parting")
    assert unload(server, "parting", expected_version=second).status_code == 404
    spec = httpx.get(f"{server.url}/openapi.json", timeout=60, trust_env=False).json()
    assert "expected_version" in spec["components"]["schemas"]["UnloadRequest"]["properties"]


def test_models_show_the_path_that_was_given(server, client, places):
    for path in (places.adapters / "plain", f"{places.adapters}/plain/", "plain"):
        for inplace in (False, True):
            assert load(server, "shown", path, load_inplace=inplace).status_code == 200
            assert {c.root for c in client.models.list() if c.id == "shown"} == {str(path)}
        assert unload(server, "shown").status_code == 200


def test_a_failed_reload_leaves_the_adapter_that_was_there(server, client, places):
    assert load(server, "kept", places.adapters / "plain").status_code == 200
    build_bad("a_nan", places.adapters / "kept-nan")
    answer = load(server, "kept", places.adapters / "kept-nan", load_inplace=True)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "not_finite")
    for prompt, greedy in zip(PLAIN.prompts, PLAIN.greedy, strict=True):
        assert ask(client, "kept", prompt).token_ids == greedy
    assert unload(server, "kept").status_code == 200


def test_an_adapter_that_is_gone_when_it_is_asked_for(server, client, places):
    """Taken from the workers, its folder away: 404 with the code, for that request alone."""
    shutil.copytree(PLAIN.folder, places.adapters / "going")
    assert load(server, "going", places.adapters / "going").status_code == 200
    assert ask(client, "going", PLAIN.prompts[0]).token_ids == PLAIN.greedy[0]
    shutil.rmtree(places.adapters / "going")
    for number in range(1, 50):
        body = {"method": "remove_lora", "args": [number]}
        answer = httpx.post(f"{server.url}/collective_rpc", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
    with ThreadPoolExecutor(3) as pool:
        going = pool.submit(ask, of_its_own(client), "going", PLAIN.prompts[0])
        # Whose folders are there.
        plain = pool.submit(ask, of_its_own(client), "plain", PLAIN.prompts[0])
        base = pool.submit(ask, of_its_own(client), "base", PLAIN.prompts[0], 1)
        with pytest.raises(NotFoundError) as caught:
            going.result()
        assert caught.value.type == "not_found"
        assert plain.result().token_ids == PLAIN.greedy[0] and len(base.result().token_ids) == 1
    shutil.copytree(MOE.folder, places.adapters / "going")
    assert ask(client, "going", MOE.prompts[0]).token_ids == MOE.greedy[0]
    assert unload(server, "going").status_code == 200


def reference_greedy(adapter: RoutedAdapter, prompt: list[int], n: int) -> list[int]:
    """transformers' tokens, none of them a near tie."""
    ids = list(prompt)
    for _ in range(n):
        best = logits("base_llama", adapter, ids)[-1].topk(2)
        assert best.values[0] - best.values[1] > BOUND
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


def test_six_adapters_in_two_slots(server, client, places):
    """One after the other round robin, then all at once: each slot changes hands all the time."""
    wanted = {}
    for i in range(6):
        source = load_adapter(GOOD[("plain-a", "loramoe-a")[i % 2]])
        adapter = scaled(source, (1.0, -0.7, 2.0)[i // 2])
        folder = write_native(adapter, places.adapters / f"lru-{i}")
        wanted[f"lru-{i}"] = reference_greedy(adapter, PLAIN.prompts[0], 8)
        assert load(server, f"lru-{i}", folder).status_code == 200
    assert len({tuple(w) for w in wanted.values()}) == 6
    for _ in range(2):
        got = {name: ask(client, name, PLAIN.prompts[0], 8).token_ids for name in wanted}
        assert got == wanted
    with ThreadPoolExecutor(12) as pool:
        twice = [*wanted, *wanted]
        answers = list(
            pool.map(lambda n: ask(of_its_own(client), n, PLAIN.prompts[0], 8).token_ids, twice)
        )
    assert answers == [wanted[name] for name in twice]
    for name in wanted:
        assert unload(server, name).status_code == 200
