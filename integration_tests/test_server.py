"""One real HTTP server on the tiny Llama, asked as its users ask it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import NotFoundError, OpenAI
from typer.testing import CliRunner

from integration_tests.conditioned import Case, aloras, chain, fixture
from integration_tests.engines import FIXTURES, recorded
from integration_tests.matrix import http_error
from integration_tests.recorded_requests import conditioned, examples
from integration_tests.reference_model import logits, scaled
from integration_tests.server import (
    Server,
    base_with_tokenizer,
    command,
    ended,
    free_port,
    serving,
    words,
)
from scripts.dashboard import metric_names
from tests.bad_adapters import BAD, GOOD, build_bad
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.cli import app

pytestmark = pytest.mark.engine
BOUND = 2e-3
LOADING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
# The route that calls the workers directly: a test takes an adapter away as an eviction would.
CALLING = {"VLLM_SERVER_DEV_MODE": "1"}
TOKEN = "the-operators-token-of-this-test"
ADMIN = {"x-lora-ext-token": TOKEN}
STATUS = {"not_found": 404, "path_not_allowed": 403}
PLAIN, MOE = recorded("plain-a"), recorded("loramoe-a")


@dataclasses.dataclass(frozen=True)
class Places:
    base: Path
    adapters: Path
    outside: Path
    token: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    """A base with a tokenizer; a folder that adapters may be read from, and one that not."""
    root = tmp_path_factory.mktemp("server")
    adapters, outside = root / "adapters", root / "outside"
    shutil.copytree(PLAIN.folder, adapters / "plain")
    shutil.copytree(MOE.folder, adapters / "loramoe")
    write_native(load_adapter(MOE.folder), adapters / "native")
    shutil.copytree(PLAIN.folder, outside / "plain")
    (root / "token").write_text(f"{TOKEN}\n")
    return Places(base_with_tokenizer(root / "base_llama"), adapters, outside, root / "token")


@pytest.fixture(scope="module")
def server(places) -> Iterator[Server]:
    settings = {
        "adapter_roots": [str(places.adapters)], "max_router_rows": 8,
        "admin_token_file": str(places.token),
    }  # fmt: skip
    argv = command(
        places.base, free_port(), settings,
        "--enable-scale-out",  # the route that takes tokens and gives some
        "--lora-modules", f"plain={places.adapters}/plain", f"loramoe={places.adapters}/loramoe",
    )  # fmt: skip
    with serving(argv, places.base.parent / "server.log", **LOADING, **CALLING) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as openai:  # fmt: skip
        yield openai


def ask(client: OpenAI, model: str, prompt: Any, n: int = 12, **extra: Any) -> Any:
    """The one choice of a greedy completion."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=n, temperature=0, logprobs=5,
        extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
    )  # fmt: skip
    return answer.choices[0]


def load(server: Server, name: str, path: Path | str, **more: Any) -> httpx.Response:
    return post(server, "load_lora_adapter", lora_name=name, lora_path=str(path), **more)


def unload(server: Server, name: str) -> httpx.Response:
    return post(server, "unload_lora_adapter", lora_name=name)


def post(
    server: Server, route: str, headers: dict[str, str] = ADMIN, **body: Any
) -> httpx.Response:
    url = f"{server.url}/v1/{route}"
    return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)


def listed(server: Server, name: str) -> dict[str, Any]:
    """What the server says of an adapter."""
    answer = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    (row,) = [row for row in answer.json()["data"] if row["name"] == name]
    return row


def version_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-lora-ext-version"]


def names(client: OpenAI) -> set[str]:
    return {card.id for card in client.models.list()}


def refused(client: OpenAI, name: str) -> None:
    """A name that is not loaded answers 404, never as the base model."""
    with pytest.raises(NotFoundError):
        ask(client, name, PLAIN.prompts[0], 1)


def worst_prompt(choice: Any, wanted: torch.Tensor) -> float:
    """Largest difference of the log-probabilities that came back for the prompt."""
    logp = torch.log_softmax(wanted.double(), -1)
    rows = choice.prompt_logprobs[1:]
    assert len(rows) == wanted.shape[0] - 1
    return max(
        abs(entry["logprob"] - logp[t, int(token)].item())
        for t, row in enumerate(rows) for token, entry in row.items()
    )  # fmt: skip


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
        scored = list(pool.map(lambda j: ask(client, j[0], j[1], prompt_logprobs=5), jobs))
        again = list(pool.map(lambda j: ask(client, j[0], j[1]), jobs))
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


def streamed(server: Server, model: str, prompt: list[int], n: int) -> tuple[str, list[int]]:
    """The version that the header names before the first token, and the tokens."""
    body = {"model": model, "prompt": prompt, "stream": True, "max_tokens": n, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    got: list[int] = []
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False
    ) as stream:
        version = stream.headers["x-lora-ext-version"]
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    got += choice.get("token_ids") or []
    return version, got


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


@pytest.mark.parametrize("route", ["completions", "chat/completions", "responses", "embeddings"])
def test_every_answer_says_which_version_gave_it(server, route):
    said = {
        "completions": {"prompt": "t1"}, "responses": {"input": "t1"},
        "chat/completions": {"messages": [{"role": "user", "content": "t1"}]},
        "embeddings": {"input": "t1"},
    }[route]  # fmt: skip
    version = listed(server, "plain")["version"]
    for model, wanted in (("plain", version), ("base", None)):
        answer = post(server, route, model=model, max_tokens=2, headers={}, **said)
        if route == "embeddings":
            assert answer.status_code == 404  # no route of a model that generates
            continue
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-lora-ext-version") == wanted
        fingerprint = answer.json().get("system_fingerprint")
        if route != "responses":
            assert fingerprint.endswith(f"-{version}") == (wanted is not None)


def test_only_the_operator_changes_what_is_loaded(server, client, places):
    before = names(client)
    routes = [
        ("load_lora_adapter", {"lora_name": "x", "lora_path": f"{places.adapters}/plain"}),
        ("unload_lora_adapter", {"lora_name": "plain"}),
        ("lora_ext/rollback", {"lora_name": "plain", "version": "0"}),
    ]
    for route, body in routes:
        for headers, seen in (
            ({}, (401, "no_token")), ({"x-lora-ext-token": "wrong"}, (403, "wrong_token")),
        ):  # fmt: skip
            answer = post(server, route, headers=headers, **body)
            assert (answer.status_code, answer.json()["error"]["type"]) == seen, answer.text
            assert TOKEN not in answer.text
    sagemaker = {"name": "x", "src": f"{places.adapters}/plain"}
    answer = httpx.post(f"{server.url}/adapters", json=sagemaker, timeout=60, trust_env=False)
    assert answer.status_code in (401, 404), answer.text
    assert names(client) == before
    assert ask(client, "plain", PLAIN.prompts[0]).token_ids == PLAIN.greedy[0]


def test_errors_name_no_place_of_the_server(server, places):
    for path in (places.outside / "none", "none", "plain/none", "../outside/plain"):
        answer = load(server, "nowhere", path)
        said = answer.json()["error"]["message"].replace(str(path), "")
        assert answer.status_code in (403, 404) and str(places.base.parent) not in said, said


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
        going = pool.submit(ask, client, "going", PLAIN.prompts[0])
        plain = pool.submit(ask, client, "plain", PLAIN.prompts[0])  # its folder is there
        base = pool.submit(ask, client, "base", PLAIN.prompts[0], 1)
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


def of_its_own(client: OpenAI) -> OpenAI:
    """A client with its own connections: one thread may close what another reads from."""
    return OpenAI(
        base_url=client.base_url, api_key=client.api_key, max_retries=0, timeout=client.timeout
    )


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


def holdings(server: Server) -> tuple[Any, float]:
    """What the server says that it holds."""
    answer = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    return answer.json(), counters(server)["lora_ext:resident_bytes"]


def fingerprint(client: OpenAI) -> dict[str, Any]:
    """Tokens and exact log-probabilities of a good adapter, a routed one and the base."""
    choices = {m: ask(client, m, PLAIN.prompts[1], 4) for m in ("plain", "loramoe", "base")}
    return {m: (c.token_ids, c.logprobs.top_logprobs) for m, c in choices.items()}


def test_bad_adapters_are_refused_and_touch_nobody(server, client, places):
    """Every malformed folder, while good requests go on in a second thread."""
    fingerprint(client)  # from here on the prompts come out of the prefix cache
    before, during, stop = fingerprint(client), [], threading.Event()

    def neighbour() -> None:
        while not stop.is_set():
            during.append(fingerprint(client))

    thread = threading.Thread(target=neighbour)
    thread.start()
    wrong: dict[str, Any] = {}
    loaded = names(client)
    try:
        for name, entry in BAD.items():
            build_bad(name, places.adapters / "bad" / name)
            answer = load(server, f"bad-{name}", places.adapters / "bad" / name)
            error = answer.json()["error"] if answer.status_code != 200 else {}
            seen = answer.status_code, error.get("type")
            if seen != (STATUS.get(entry.code, 400), entry.code):
                wrong[name] = seen, entry.code, error.get("message")
            elif "; fix: " not in error["message"] or "lora_ext:" in error["message"].split(";")[0]:
                wrong[name] = error["message"]
            refused(client, f"bad-{name}")
    finally:
        stop.set()
        thread.join()
    print(f"{len(BAD)} folders, {3 * len(during)} answers to neighbours meanwhile")
    assert wrong == {}
    assert names(client) == loaded
    assert len(during) >= 10
    assert all(answer == before for answer in during)
    assert fingerprint(client) == before


def test_an_adapter_of_another_base(server, client, places):
    shutil.copytree(GOOD["meteora-a"], places.adapters / "of-qwen2")
    answer = load(server, "of-qwen2", places.adapters / "of-qwen2")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] in ("wrong_base", "shape_mismatch", "unknown_module")
    refused(client, "of-qwen2")


def test_two_passes_are_a_setting(server, client, places):
    xlora = FIXTURES / "conditioned" / "xlora_topk-a" / "adapter"
    shutil.copytree(xlora, places.adapters / "xlora")
    answer = load(server, "xlora", places.adapters / "xlora")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "unsupported_feature")
    assert '"two_pass": true' in error["message"]
    refused(client, "xlora")


def test_a_mended_adapter_loads_under_the_name_that_failed(server, client, places):
    folder = places.adapters / "mended"
    build_bad("router_nan", folder)
    assert load(server, "mended", folder).json()["error"]["type"] == "not_finite"
    shutil.rmtree(folder)
    shutil.copytree(MOE.folder, folder)
    assert load(server, "mended", folder).status_code == 200
    assert ask(client, "mended", MOE.prompts[3]).token_ids == MOE.greedy[3]
    assert unload(server, "mended").status_code == 200


def test_only_the_allowed_folders_are_read(server, client, places):
    loaded = names(client)
    (places.adapters / "link").symlink_to(places.outside / "plain")
    (places.adapters / "up").symlink_to("..")
    paths = [
        places.outside / "plain", "/etc", "/", "~", "..", "../outside/plain",
        f"{places.adapters}/../outside/plain", places.adapters / "link", "link", "up/outside/plain",
        "/no/such/folder", "plain\0", f"{places.adapters}x",
    ]  # fmt: skip
    for i, path in enumerate(paths):
        answer = load(server, f"outside-{i}", path)
        seen = answer.status_code, answer.json()["error"]["type"]
        assert seen == (403, "path_not_allowed"), (path, answer.text)
        refused(client, f"outside-{i}")
    for path in ("org/no-such-adapter", places.adapters / "none"):
        answer = load(server, "absent", path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
    assert names(client) == loaded
    assert load(server, "relative", "plain").status_code == 200  # below the allowed folder
    assert ask(client, "relative", PLAIN.prompts[0]).token_ids == PLAIN.greedy[0]
    assert unload(server, "relative").status_code == 200


def test_the_log_names_the_code_of_a_refusal(server, places):
    load(server, "logged", places.outside / "plain")
    assert "'logged': [lora_ext:path_not_allowed]" in server.log.read_text()


def send(server: Server, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/{route}", json=body, timeout=60, trust_env=False)


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


def test_derived_adapters_are_counted(server, client, mixed):
    fx = mixed["scales-a"]
    said = {"adapters": [{"name": "scales-a-red", "scale": 0.123}]}
    before = counters(server)
    for _ in range(3):
        ask(client, "base", fx.prompt(fx.requests[0]), 1, lora_ext=said)
    made, hit = (counters(server)[n] - before[n] for n in COUNTERS[:2])
    assert (made, hit) == (1, 2)
    assert set(COUNTERS) <= set(counters(server))


COUNTERS = (
    "lora_ext:derived_adapters_made_total", "lora_ext:derived_adapters_hit_total",
    "lora_ext:derived_adapters_evicted_total", "lora_ext:gate_passes_total",
)  # fmt: skip


def counters(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("lora_ext:"))
    return {name: float(value) for name, value in lines}


def test_the_engines_numbers_stand_on_metrics(server, client, places):
    """What went into slots and what clients were refused; every name of the dashboard is there."""
    before = counters(server)
    assert before["lora_ext:slots"] == 2 >= before["lora_ext:slots_used"]
    assert load(server, "seen", places.adapters / "native").status_code == 200
    assert load(server, "unseen", places.adapters / "none").status_code == 404
    for model in ("plain", "loramoe", "seen", "plain"):  # two slots: each finds its own taken
        ask(client, model, PLAIN.prompts[0], 1)
    after = counters(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["lora_ext:activations_total"] >= 3
    assert grown["lora_ext:adapter_steps_total"] >= 4
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


@pytest.mark.slow
def test_a_bad_adapter_at_start_stops_the_server(places, tmp_path):
    """And without adapter_roots, a server that loads at run time warns of it."""
    build_bad("b_inf", tmp_path / "bad")
    argv = command(
        places.base, free_port(), None, "--enforce-eager", "--lora-modules", f"bad={tmp_path}/bad"
    )
    status, log, seconds = ended(argv, tmp_path / "log", fork=True, **LOADING)
    print(f"ended with {status} after {seconds:.0f} s")
    assert status not in (0, None)
    assert "[lora_ext:not_finite]" in log
    assert "may read any path that this server can" in log


@pytest.mark.slow
def test_bad_settings_stop_the_server(places, tmp_path):
    argv = command(places.base, free_port(), {"max_router_row": 8}, "--enforce-eager")
    status, log, seconds = ended(argv, tmp_path / "log", fork=True)
    print(f"ended with {status} after {seconds:.0f} s")
    assert status not in (0, None)
    assert "[lora_ext:bad_settings]" in log
    assert "max_router_row;" in log
    said = ("Starting to load model", "Loading weights took", "Loading safetensors")
    assert not any(line in log for line in said), "weights were loaded first"
