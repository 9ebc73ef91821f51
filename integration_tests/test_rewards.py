"""DMoERM in a real engine and behind a real server: the authors' numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from integration_tests.conditioned import fixture
from integration_tests.engines import FIXTURES, base_path, close, make_engine
from integration_tests.recorded_requests import examples
from integration_tests.server import Server, command, free_port, serving
from tests.make_reward import add_tokenizer, defined, make_reward_model
from vllm_lora_ext import RewardModel
from vllm_lora_ext import reward as offline
from vllm_lora_ext.cli import app

pytestmark = pytest.mark.engine
FOLDER, BASE, BOUND = FIXTURES / "conditioned/dmoerm-a/adapter", base_path("base_llama_tiny"), 1e-3
META, NUMBERS = fixture("dmoerm-a")


def texts() -> list[dict[str, Any]]:
    return [
        {name: NUMBERS[f"{name}_{i}"].tolist() for name in ("router_ids", "inner_ids")}
        for i in range(len(META["requests"]))
    ]


def as_chat(text: dict[str, Any]) -> dict[str, Any]:
    """Its words; what was answered before the last turn is not read."""
    said = [" ".join(f"t{i}" for i in turn) for turn in split(text["router_ids"], 5)]
    reply = " ".join(f"t{i}" for i in split(text["inner_ids"], 6)[-1][:-1])
    answers = ["t9"] * (len(said) - 1) + [reply]
    messages = [
        {"role": role, "content": content}
        for turn in zip(said, answers, strict=True)
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": messages}


def split(ids: list[int], mark: int) -> list[list[int]]:
    """What follows each mark."""
    starts = [i for i, token in enumerate(ids) if token == mark]
    return [ids[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def check(found: list[dict[str, Any]]) -> float:
    worst = 0.0
    for i, said in enumerate(found):
        assert said["category"] == META["requests"][i]["category"]
        probs = torch.tensor(said["category_probs"]) - NUMBERS[f"category_probs_{i}"]
        reward = said["reward"] - float(NUMBERS[f"shared_reward_{i}"])
        worst = max(worst, abs(reward), float(probs.abs().max()))
    return worst


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With two slots for five experts: they take turns, and are right."""
    from vllm.config import PoolerConfig

    base = shutil.copytree(BASE, tmp_path_factory.mktemp("base") / "base")
    add_tokenizer(base)  # which the engine does without: for chats
    llm = make_engine(
        base, runner="pooling", convert="embed", max_loras=2, enforce_eager=True,
        pooler_config=PoolerConfig(seq_pooling_type="LAST"),
    )  # fmt: skip
    yield llm
    close(llm)


def test_the_authors_numbers(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel(FOLDER, llm)
    for asked in (texts(), texts()):  # the second time out of the prefix cache
        worst = check([vars(reward) for reward in model.score(asked)])
        print(f"DMoERM offline: largest difference {worst:.1e}")
        assert worst < BOUND
    for i, text in enumerate(texts()):  # alone
        assert abs(model.score([text])[0].reward - float(NUMBERS[f"shared_reward_{i}"])) < BOUND
    assert model.score([]) == []
    calls, encode = [], llm.encode
    with monkeypatch.context() as patch:
        patch.setattr(llm, "encode", lambda p, *a, **k: calls.append(p) or encode(p, *a, **k))
        model.score(texts())
    assert [len(prompts) for prompts in calls] == [
        sum(len(said["points"]) for said in META["requests"])
    ]
    assert "chat, subj_qa" in model.note


def test_other_shapes_beside_it(llm: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(BASE)
    points = {"one": ["a"], "three": ["a", "b", "c"]}
    folder = make_reward_model(tmp_path / "rm", config, points, others=["none"], rank=7, slopes=20)
    model, base = RewardModel(folder, llm), AutoModel.from_pretrained(BASE, dtype=torch.float32)
    asked = [{"router_ids": t["router_ids"][i:], "inner_ids": t["inner_ids"][i:]}
             for t in texts() for i in range(4) if len(t["router_ids"]) > i]  # fmt: skip
    for text, said in zip(asked, model.score(asked), strict=True):
        probs, reward = defined(folder, base, text["router_ids"], text["inner_ids"])
        assert (torch.tensor(probs) - torch.tensor(said.category_probs)).abs().max() < BOUND
        assert (said.reward is None) is (reward is None)
        assert reward is None or abs(said.reward - reward) < BOUND


def test_an_engine_that_pools_otherwise_is_refused(llama_eager: Any) -> None:
    with pytest.raises(ValueError, match=r"bad_settings.*--convert embed"):
        RewardModel(FOLDER, llama_eager)


def test_experts_of_another_base_are_refused(llm: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(BASE, num_hidden_layers=3)
    folder = make_reward_model(tmp_path / "rm", config, {"one": ["a"]})
    with pytest.raises(ValueError, match=r"wrong_base|unknown_module"):
        RewardModel(folder, llm)


def test_the_command(llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "start_engine", lambda options: llm)
    monkeypatch.setattr(offline, "stop_engine", lambda llm: None)
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, texts())) + "\n\n")
    asked = ["reward", str(FOLDER), "--base", str(BASE), "--input", str(file)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(line) for line in lines] == [{"category", "category_probs", "reward"}] * 6
    assert check(lines) < BOUND
    assert "one engine has one base" in " ".join(done.stderr.split())
    file.write_text("\n".join(json.dumps(as_chat(text)) for text in texts()))
    done = CliRunner().invoke(app, asked)
    assert check([json.loads(line) for line in done.stdout.splitlines()]) < BOUND
    file.write_text('{"router_ids": [5], "inner_ids": [999]}')
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1 and "bad_value" in done.stderr and not done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("rewards")
    argv = command(
        BASE, free_port(), {"reward": {"models": {"rm": str(FOLDER)}}}, "--enforce-eager",
        "--skip-tokenizer-init", "--runner", "pooling", "--convert", "embed",
    )  # fmt: skip
    with serving(argv, root / "log", fork=True) as running:
        yield running


def post(server: Server, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/lora_ext/reward", json=body, timeout=60, trust_env=False)


def test_over_http(server: Server) -> None:
    answer = post(server, {"model": "rm", "input": texts()})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["object"], found["model"]) == ("list", "rm")
    assert [one["index"] for one in found["data"]] == list(range(6))
    worst = check(found["data"])
    print(f"DMoERM over HTTP: largest difference {worst:.1e}")
    assert worst < BOUND
    scope = {"httpx": httpx, "url": server.url, **texts()[0]}
    for block in examples("rewards_and_labels.md", "reward"):
        exec(compile(block, "docs/rewards_and_labels.md", "exec"), scope)
    assert check([scope["first"]]) < BOUND


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({"model": "rm", "input": []}, 400, "bad_value", "no text"),
        ({"model": "rm"}, 400, "bad_value", "body.input is missing"),
        ({"model": "rm", "input": 3}, 400, "bad_value", "body.input"),
        ({"model": "rm", "input": [{}], "n": 2}, 400, "bad_value", "body.n"),
        ({"model": "rm", "input": {"router_ids": [5]}}, 400, "bad_value", "input[0].inner_ids"),
        ({"model": "rm", "input": {"router_ids": [5], "inner_ids": [5] * 257}}, 400, "bad_value",
         "too long"),
        ({"model": "rm", "input": {"router_ids": [5], "inner_ids": [80]}}, 400, "bad_value",
         "input[0].inner_ids"),
        ({"model": "other", "input": texts()}, 404, "not_found", "reward.models"),
        ([], 400, "bad_value", "body"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(
    server: Server, body: Any, status: int, code: str, words: str
) -> None:
    answer = post(server, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (code, status)
    assert words in error["message"]
    assert check(post(server, {"model": "rm", "input": texts()[:1]}).json()["data"]) < BOUND


def test_a_body_that_is_no_json(server: Server) -> None:
    url = f"{server.url}/v1/lora_ext/reward"
    answer = httpx.post(
        url, content=b"{", headers={"Content-Type": "application/json"}, timeout=60, trust_env=False
    )
    assert answer.status_code == 400
