"""Label scores: the authors' numbers without an engine, and what a line may say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.cli import app
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.labels import BY, Question, Scores, read_question, score_labels

ROOT, BASE = FIXTURES / "conditioned" / "menta-a", FIXTURES / "bases" / "base_llama"
META, NUMBERS = (
    json.loads((ROOT / "meta.json").read_text()),
    load_file(ROOT / "expected.safetensors"),
)
BOUND = 1e-4


class Model:
    """What `score_labels` asks of vLLM's `LLM`, answered by transformers."""

    def __init__(self, model: Any) -> None:
        self._model, self.calls = model, []
        sizes = SimpleNamespace(max_model_len=256, get_vocab_size=lambda: 512)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=sizes))

    def generate(self, prompts: Any, params: Any, **_: Any) -> list[Any]:
        asked = [p["prompt_token_ids"] for p in prompts]
        self.calls.append(asked)
        outputs = []
        for ids, wanted in zip(asked, params, strict=True):
            assert len(wanted.logprob_token_ids) <= 128
            with torch.inference_mode():
                row = self._model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            found = {t: SimpleNamespace(logprob=float(row[t])) for t in wanted.logprob_token_ids}
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(logprobs=[found])]))
        return outputs


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def questions() -> tuple[list[Question], list[dict[str, Any]]]:
    found, prompts = [], []
    for task in META["tasks"]:
        for prompt in task["prompts"]:
            line = {"prompt": NUMBERS[f"prompt_{prompt['prompt']}"].tolist(),
                    "labels": task["labels"], "id": prompt["prompt"]}  # fmt: skip
            found.append(read_question(line, "text", no_tokenizer))
            prompts.append(prompt)
    return found, prompts


def no_tokenizer() -> Any:
    raise AssertionError("ids need no tokenizer")


def check(prompts: list[dict[str, Any]], scores: list[Scores]) -> float:
    worst = 0.0
    for prompt, said in zip(prompts, scores, strict=True):
        key = prompt["prompt"]
        sums, first = NUMBERS[f"label_logprob_{key}"], NUMBERS[f"label_first_logprob_{key}"]
        tokens = torch.tensor([t for label in said.tokens for t in label])
        worst = max(
            worst, float((tokens - NUMBERS[f"token_logprobs_{key}"]).abs().max()),
            float((torch.tensor(said.by("sum")) - sums).abs().max()),
            float((torch.tensor(said.by("first")) - first).abs().max()),
        )  # fmt: skip
        lengths = torch.tensor([len(label) for label in said.tokens])
        worst = max(worst, float((torch.tensor(said.by("mean")) - sums / lengths).abs().max()))
        assert said.best("sum") == prompt["argmax_sum"], key
        assert said.best("first") == prompt["argmax_first_token"], key
        assert said.best("mean") == prompt["argmax_mean"], key
    return worst


def test_the_authors_numbers(model: Any) -> None:
    asked, prompts = questions()
    with apply_adapter(model, load_adapter(ROOT / "adapter")):
        assert check(prompts, score_labels(Model(model), asked)) < BOUND
    for question, said in zip(asked, score_labels(Model(model), asked), strict=True):
        base = NUMBERS[f"base_label_logprob_{question.key}"]
        assert (torch.tensor(said.by("sum")) - base).abs().max() < BOUND


def test_prompts_go_first_and_each_beginning_once(model: Any) -> None:
    llm = Model(model)
    question = Question([9, 10, 11], [[5, 6, 7], [5, 6], [5, 6, 8], [9]], [])
    score_labels(llm, [question, question])
    first, second = llm.calls
    assert first == [[9, 10, 11]] * 2
    assert second == [[9, 10, 11, 5], [9, 10, 11, 5, 6]] * 2
    score_labels(llm, [Question([9], [[5], [6]], [])])
    assert len(llm.calls) == 3  # labels of one token need no second


def test_more_labels_than_one_request_can_ask_for(model: Any) -> None:
    labels = [[token] for token in range(300)]
    (said,) = score_labels(Model(model), [Question([9, 10], labels, [])])
    with torch.inference_mode():
        row = model(torch.tensor([[9, 10]])).logits[0, -1].log_softmax(-1)
    assert (torch.tensor(said.by("first")) - row[:300]).abs().max() < BOUND


def test_equal_scores_go_to_the_first_label() -> None:
    said = Scores([[-2.0], [-1.0, -3.0], [-1.0, -1.0]])
    assert [said.best(by) for by in BY] == [1, 0, 2]
    assert said.by("mean") == [-2.0, -2.0, -1.0]


def test_a_line_of_the_answer() -> None:
    question = Question([4], [[5], [6, 7]], ["yes", "no"], key="k")
    line = Scores([[-2.0], [-1.0, -3.0]]).as_dict(question, "first")
    assert line == {
        "id": "k", "label": "no", "by": "first", "best": {"first": 1, "sum": 0, "mean": 0},
        "scores": {"first": [-2.0, -1.0], "sum": [-2.0, -4.0], "mean": [-2.0, -2.0]},
        "token_logprobs": [[-2.0], [-1.0, -3.0]],
    }  # fmt: skip


class Words:
    """A tokenizer: a number is a token, and 1 begins a text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}

    def apply_chat_template(self, chat: Any, **_: Any) -> str:
        return "2 " + " 3 ".join(message["content"] for message in chat)


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"prompt": "10 11"}, [1, 10, 11]),
        ({"prompt": [10, 11]}, [10, 11]),
        ({"prompt_ids": [10, 11]}, [10, 11]),
        ({"messages": [{"role": "user", "content": "10"},
                       {"role": "assistant", "content": "11"}]}, [2, 10, 3, 11]),
    ],
)  # fmt: skip
def test_what_a_line_may_say(line: dict[str, Any], prompt: list[int]) -> None:
    question = read_question({**line, "labels": ["7 8", [9]]}, "text 1", Words)
    assert (question.prompt, question.labels) == (prompt, [[7, 8], [9]])
    assert question.names == ["7 8", [9]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({}, "labels is missing"),
        ({"prompt": [5]}, "labels is missing"),
        ({"labels": [[5]]}, "0 prompts"),
        ({"prompt": [5], "prompt_ids": [5], "labels": [[5]]}, "2 prompts"),
        ({"prompt": [5], "labels": []}, "labels"),
        ({"prompt": [5], "labels": [[]]}, "labels[0]"),
        ({"prompt": [5], "labels": [""]}, "labels[0]"),
        ({"prompt": [5], "labels": [" "]}, "no token"),
        ({"prompt": [], "labels": [[5]]}, "prompt"),
        ({"prompt": [True], "labels": [[5]]}, "prompt"),
        ({"prompt": [5], "labels": [[-5]]}, "labels[0][0]"),
        ({"prompt": [5], "labels": [[5]], "more": 1}, "more"),
        ("text", "text 1"),
    ],
)
def test_lines_that_are_refused(line: Any, words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read_question(line, "text 1", Words)
    assert caught.value.code == "bad_value"
    assert words in caught.value.text and "text 1" in caught.value.text


def test_ids_and_lengths_that_the_model_does_not_take(model: Any) -> None:
    for question in (
        Question([512], [[5]], []), Question([5], [[5], [5, 512]], []),
        Question([5] * 255, [[5, 6]], []),
    ):  # fmt: skip
        with pytest.raises(AdapterError) as caught:
            score_labels(Model(model), [question])
        assert caught.value.code == "bad_value"


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": [5], "labels": [[5]], "extra": 1}\n')
    done = CliRunner().invoke(app, ["label", "--base", str(BASE), "--input", str(file)])
    assert done.exit_code == 1
    assert "bad_value" in done.stderr and "text 1" in done.stderr
    file.write_text('{"prompt": "some text", "labels": [[5]]}\n')
    done = CliRunner().invoke(app, ["label", "--base", str(BASE), "--input", str(file)])
    assert done.exit_code == 2 and "tokenizer" in done.output
