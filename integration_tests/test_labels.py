"""Menta's label scores in a real engine and over HTTP."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from integration_tests.conditioned import adapter, fixture
from integration_tests.engines import FIXTURES, base_path
from vllm_lora_ext import engines
from vllm_lora_ext.cli import app
from vllm_lora_ext.labels import BY, Question, score_labels

pytestmark = pytest.mark.engine
command = importlib.import_module("vllm_lora_ext.cli.label")
BOUND, MENTA = 1e-3, "menta-a"
META, NUMBERS = fixture(MENTA)


def lines() -> list[dict[str, Any]]:
    return [
        {"prompt": NUMBERS[f"prompt_{p['prompt']}"].tolist(), "labels": task["labels"],
         "id": p["prompt"]}
        for task in META["tasks"] for p in task["prompts"]
    ]  # fmt: skip


def questions() -> list[Question]:
    return [Question(line["prompt"], line["labels"], [], line["id"]) for line in lines()]


def worst(key: str, scores: dict[str, list[float]], tokens: list[list[float]]) -> float:
    sums = NUMBERS[f"label_logprob_{key}"]
    wanted = {
        "first": NUMBERS[f"label_first_logprob_{key}"], "sum": sums,
        "mean": sums / torch.tensor([len(label) for label in tokens]),
    }  # fmt: skip
    diffs = [(torch.tensor(scores[by]) - wanted[by]).abs().max() for by in BY]
    flat = torch.tensor([t for label in tokens for t in label])
    return float(max(*diffs, (flat - NUMBERS[f"token_logprobs_{key}"]).abs().max()))


def test_the_authors_numbers(llama: Any) -> None:
    """With tokens 0 and others beside them in the batch, of prompts with shorter lists."""
    more = Question([9, 10, 11], [[0], [1], [2], [3]], [])
    for lora, key in ((adapter(MENTA), "label_logprob"), (None, "base_label_logprob")):
        *found, said = score_labels(llama, [*questions(), more], lora)
        diffs = [
            float((torch.tensor(s.by("sum")) - NUMBERS[f"{key}_{q.key}"]).abs().max())
            for s, q in zip(found, questions(), strict=True)
        ]
        print(f"labels, {key}: largest difference {max(diffs):.1e}")
        assert max(diffs) < BOUND
        assert all(-50 < score < 0 for score in said.by("first"))


def test_labels_find_their_prompt_in_the_prefix_cache(llama_eager: Any) -> None:
    """One prompt of 200 tokens, 20 labels of three: its blocks are computed once."""
    prompt = [(7 * i) % 500 + 4 for i in range(200)]
    labels = [[5 + i, 6, 7 + i] for i in range(20)]
    outputs: list[Any] = []
    generate = llama_eager.generate

    class Watched:
        llm_engine = llama_eager.llm_engine

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            found = generate(*args, **kwargs)
            outputs.append(found)
            return found

    score_labels(Watched(), [Question(prompt, labels, [])], adapter(MENTA))
    first, second = outputs
    assert len(first) == 1 and len(second) == 40
    assert all(output.num_cached_tokens >= 192 for output in second)


def test_the_command(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "start_engine", lambda options: llama)
    monkeypatch.setattr(engines, "stop_engine", lambda llm: None)
    monkeypatch.setattr(command, "_lora", lambda folder: adapter(MENTA))
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines())))
    folder = FIXTURES / "conditioned" / MENTA / "adapter"
    asked = ["label", str(folder), "--base", str(base_path("base_llama")), "--input", str(file)]
    names = {"first": "argmax_first_token", "sum": "argmax_sum", "mean": "argmax_mean"}
    for by, name in names.items():
        done = CliRunner().invoke(app, [*asked, "--by", by])
        assert done.exit_code == 0, done.output
        found = [json.loads(line) for line in done.stdout.splitlines()]
        prompts = [p for task in META["tasks"] for p in task["prompts"]]
        for said, line, prompt in zip(found, lines(), prompts, strict=True):
            assert worst(prompt["prompt"], said["scores"], said["token_logprobs"]) < BOUND
            assert (said["id"], said["by"]) == (line["id"], by)
            assert said["best"][by] == prompt[name]
            assert said["label"] == line["labels"][prompt[name]]
