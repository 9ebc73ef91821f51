"""What requests say on the routes of a pooling model, over HTTP, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from integration_tests.recorded_requests import conditioned
from integration_tests.reference_model import model, where, worn
from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving, words
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.conditions.column import Column, Prompt

pytestmark = pytest.mark.engine
BOUND, BASE = 2e-3, "base_llama"
PROMPTS = ([5, 17, 33, 101, 7, 200], [9, 8, 7, 6, 150, 299, 44, 45, 46], [12, 13, 280])
ADAPTERS = {folder.name: folder for folder in conditioned("scales-a").adapters}
# What a request says, and the columns that this is.
SAID: dict[str, tuple[str, dict[str, Any] | None, dict[str, Column]]] = {
    "base": ("base", None, {}),
    "plain": ("red", None, {"red": Column()}),
    "scale": ("base", {"adapters": [{"name": "red", "scale": -0.5}]}, {"red": Column(scale=-0.5)}),
    "spans": (
        "base",
        {"adapters": [{"name": "red"}, {"name": "blue", "scale": 2, "spans": [[1, 3]]}]},
        {"red": Column(), "blue": Column(scale=2.0, spans=((1, 3),))},
    ),
}


def converted(root: Path, task: str) -> AbstractContextManager[Server]:
    """A server of the base model and both adapters, for one task of a pooling model."""
    argv = command(
        base_with_tokenizer(root / BASE), free_port(), None, "--runner", "pooling", "--convert",
        task, "--enforce-eager", "--lora-modules", *(f"{n}={p}" for n, p in ADAPTERS.items()),
    )  # fmt: skip
    return serving(argv, root / "server.log", fork=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with converted(tmp_path_factory.mktemp("embed"), "embed") as running:
        yield running


@cache
def wanted(kind: str, number: int) -> torch.Tensor:
    """transformers' embedding: the last token's state after the final norm, of length 1."""
    net, ids = model(BASE), PROMPTS[number]
    with torch.inference_mode(), ExitStack() as hooks:
        for name, column in SAID[kind][2].items():
            adapter = where(load_adapter(ADAPTERS[name]), column)
            hooks.enter_context(worn(net, adapter, Prompt(len(ids), ids, {})))
        state = net.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return state / state.norm()


def post(server: Server, route: str, kind: str, body: dict[str, Any]) -> Any:
    name, said, _ = SAID[kind]
    full = {"model": name, **body} | ({"lora_ext": said} if said else {})
    answer = httpx.post(f"{server.url}/{route}", json=full, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def embeddings(server: Server, kind: str) -> list[Any]:
    data = post(server, "v1/embeddings", kind, {"input": list(PROMPTS)})["data"]
    return [row["embedding"] for row in data]


def pooling(server: Server, kind: str) -> list[Any]:
    body = {"input": [words(ids) for ids in PROMPTS], "task": "embed"}
    return [row["data"] for row in post(server, "pooling", kind, body)["data"]]


def cohere(server: Server, kind: str) -> list[Any]:
    body = {"texts": [words(ids) for ids in PROMPTS], "embedding_types": ["float"]}
    found: list[Any] = post(server, "v2/embed", kind, body)["embeddings"]["float"]
    return found


def test_the_requests_differ() -> None:
    rows = [wanted(kind, 0) for kind in SAID]
    distances = [(a - b).abs().max() for i, a in enumerate(rows) for b in rows[:i]]
    assert min(distances) > 10 * BOUND


@pytest.mark.parametrize("route", [embeddings, pooling, cohere])
def test_embeddings(server: Server, route: Callable[..., list[Any]]) -> None:
    """All kinds of requests at once, three prompts in each; then again."""
    for _ in range(2):
        with ThreadPoolExecutor(len(SAID)) as pool:
            found = dict(zip(SAID, pool.map(lambda k: route(server, k), SAID), strict=True))
        worst = max(
            (torch.tensor(row) - wanted(kind, i)).abs().max().item()
            for kind, rows in found.items() for i, row in enumerate(rows)
        )  # fmt: skip
        print(f"{route.__name__}: largest difference {worst:.1e}")
        assert worst < BOUND


@pytest.mark.parametrize("route", ["score", "rerank"])
def test_scores(server: Server, route: str) -> None:
    first, *others = map(words, PROMPTS)
    body: dict[str, Any] = {"queries": first, "documents": others}
    if route == "rerank":
        body = {"query": first, "documents": others}
    for kind in SAID:
        answer = post(server, route, kind, body)
        if route == "rerank":
            scores = {row["index"]: row["relevance_score"] for row in answer["results"]}
        else:
            scores = {row["index"]: row["score"] for row in answer["data"]}
        for i in range(len(others)):
            want = wanted(kind, 0) @ wanted(kind, i + 1)
            assert abs(scores[i] - want.item()) < BOUND, kind


ROUTES = {
    "v1/embeddings": {"input": [5, 6]}, "v2/embed": {"texts": ["t5"]}, "pooling": {"input": "t5"},
    "score": {"queries": "t5", "documents": "t6"}, "rerank": {"query": "t5", "documents": ["t6"]},
}  # fmt: skip


def answered_by(server: Server, route: str, body: dict[str, Any]) -> dict[str, str | None]:
    """The version that the answers of each model say."""
    found = {}
    for name in ("base", "red", "blue"):
        answer = httpx.post(
            f"{server.url}/{route}", json={"model": name, **body}, timeout=60, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        found[name] = answer.headers.get("x-lora-ext-version")
    return found


def listed(server: Server) -> dict[str, str | None]:
    answer = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    versions = {row["name"]: row["version"] for row in answer.json()["data"]}
    assert versions["red"] != versions["blue"]
    return {"base": None, "red": versions["red"], "blue": versions["blue"]}


@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_says_which_version_gave_it(server: Server, route: str) -> None:
    assert answered_by(server, route, ROUTES[route]) == listed(server)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with converted(tmp_path_factory.mktemp("classify"), "classify") as running:
        yield running


def test_classes_say_which_version_gave_them(classifier: Server) -> None:
    assert answered_by(classifier, "classify", {"input": "t5"}) == listed(classifier)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("v1/embeddings", {"input": [5, 6]}),
        ("v1/embeddings", {"messages": [{"role": "user", "content": "t5"}]}),
        ("v2/embed", {"texts": ["t5"]}),
        ("pooling", {"input": "t5"}),
        ("score", {"queries": "t5", "documents": "t6"}),
        ("rerank", {"query": "t5", "documents": ["t6"]}),
    ],
)
def test_a_field_that_is_wrong_is_400(server: Server, route: str, body: dict[str, Any]) -> None:
    for name, said, words_of_it in (
        ("base", {"adapters": [{"name": "none"}]}, "lora_ext.adapters[0].name"),
        ("red", {"adapters": [{"name": "red"}]}, "not the base model"),
        ("base", {"adapters": [{"name": "red", "spans": [[9, 2]]}]}, "lora_ext.adapters[0].spans"),
        ("red", {"gates": {"red": 1}}, "lora_ext.gates has no use here"),
        ("red", {"trace": True}, "lora_ext.trace"),
        ("base", 5, "lora_ext of the request is no object"),
    ):
        answer = httpx.post(
            f"{server.url}/{route}", json={"model": name, "lora_ext": said, **body}, timeout=60,
            trust_env=False,
        )  # fmt: skip
        error = answer.json()["error"]
        seen = answer.status_code, error["type"], error["param"]
        assert seen == (400, "bad_value", "lora_ext"), answer.text
        assert words_of_it in error["message"]
