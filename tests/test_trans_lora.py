"""The parts of examples/trans_lora.py that need no engine."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vllm_lora_ext.errors import AdapterError

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import shallow
import synthesis
import trans_lora
import transfer
from tasks import ADAPTERS, Item, held_out

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROWS = [[1, 5, 9, 13, 20], [2, 6, 10]]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (" Date: 2004-11-07", "Date: 2004-11-07"),
        ("\n What is 3 + 4?\nQuestion: another", "What is 3 + 4?"),
        (" Question: Date: 2004-11-07", "Date: 2004-11-07"),
        ("- Time: 16:05 ", "Time: 16:05"),
        ("3. Time: 16:05", "Time: 16:05"),
        ("3.5 + 2 is what?", "3.5 + 2 is what?"),  # a number, no list
        ("1066", "1066"),
        ("  \n ", None),
        ("x" * 401, None),
    ],
)
def test_question_in_a_completion(text: str, question: str | None) -> None:
    assert synthesis.parse(text) == question


def test_a_prompt_shows_five_seeds_and_ends_where_the_next_begins() -> None:
    seeds = [f"seed {i}" for i in range(8)]
    prompt = synthesis.few_shot(seeds, random.Random(3))
    shown = [line for line in prompt.splitlines() if line.startswith("Question: ")]
    assert len({*shown}) == 5 and {*shown} <= {f"Question: {s}" for s in seeds}
    assert prompt.endswith("\nQuestion:")
    assert prompt == synthesis.few_shot(seeds, random.Random(3))
    assert synthesis.few_shot(["only"], random.Random(0)).count("only") == 1


def test_fresh_drops_what_was_seen_but_for_case_and_blanks() -> None:
    seen = {synthesis.same("A  seed")}
    assert synthesis.fresh(["a seed", "New", None, " new ", "", "Other"], seen) == ["New", "Other"]
    assert synthesis.fresh(["other", "Third"], seen) == ["Third"]


def test_discriminator_decides_by_the_likelier_word() -> None:
    logprobs = [{7: math.log(0.6), 8: math.log(0.2)}, {8: -0.1, 7: -3.0}, {7: -2.0}, {8: -1.0}, {}]
    real = [synthesis.probability_of_real(row, yes=7, no=8) for row in logprobs]
    assert real == pytest.approx([0.75, 1 / (1 + math.exp(2.9)), 1.0, 0.0, 0.0])
    assert synthesis.split(list("abcde"), real) == (["a", "c"], ["b", "d", "e"])


def test_discriminator_learns_both_kinds() -> None:
    assert synthesis.judged(["r"], ["m", "n"]) == [
        Item("r", "yes"),
        Item("m", "no"),
        Item("n", "no"),
    ]


class Writer:
    """Writes numbers; takes multiples of three as real."""

    def __init__(self) -> None:
        self.rounds = 0

    def synthesise(self, seeds: list[str]) -> list[str | None]:
        self.rounds += 1
        return [None, seeds[0], *(str(n % 70) for n in range(30 * self.rounds))]

    def real(self, questions: list[str], judge: Path) -> list[float]:
        return [float(int(q) % 3 == 0) for q in questions]

    def answers(self, questions, adapter=None, max_tokens=32) -> list[str | None]:
        if adapter == Path("bad"):
            raise AdapterError("unknown_module", "no such layer")
        return [None if q == "9" else f"{q}!" for q in questions]


def inputs(test: list[Item]) -> transfer.Inputs:
    return transfer.Inputs(Path("s"), Path("a"), Path("t"), [f"seed {i}" for i in range(9)], test)


@pytest.fixture
def report() -> transfer.Report:
    return transfer.Report(Console(quiet=True))


def test_questions_are_different_real_and_not_held_out(report) -> None:
    writer, given = Writer(), inputs([Item("6", "six"), Item("61", "sixty-one")])
    found = transfer.gather(given, writer, writer, Path("judge"), 12, report)
    assert found == [str(n) for n in (0, 3, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36)]
    assert writer.rounds == 2
    assert report.data["questions"]["held_out_left_out"] == 1  # 61 was never written
    everything = transfer.gather(given, Writer(), writer, None, 12, report)
    assert everything == [str(n) for n in range(13) if n != 6]


def test_too_few_questions_are_told(report) -> None:
    with pytest.raises(SystemExit, match="only 24 questions"):
        transfer.gather(inputs([]), Writer(), Writer(), Path("judge"), 500, report)


def test_unfinished_answers_are_no_pairs(report, tmp_path) -> None:
    pairs = transfer.label(inputs([]), Writer(), ["3", "9"], 8, tmp_path / "pairs.jsonl", report)
    assert pairs == [Item("3", "3!")]
    assert json.loads((tmp_path / "pairs.jsonl").read_text()) == {"question": "3", "answer": "3!"}


def test_an_adapter_of_another_model_is_refused_before_the_engine_sees_it(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    with pytest.raises(AdapterError) as caught:
        synthesis.check_fits(tmp_path, ADAPTERS / "date")
    assert caught.value.code == "unknown_module"


def test_accuracy_or_the_reason_why_there_is_none() -> None:
    given = inputs([Item("3", "3!"), Item("9", "9!"), Item("12", "twelve"), Item("15", "15!")])
    measured = trans_lora.measure(given, Writer(), None, 8)
    assert measured == {"accuracy": 50.0, "wrong_examples": [["9", None], ["12", "12!"]]}
    refused = trans_lora.measure(given, Writer(), Path("bad"), 8)
    assert refused["accuracy"] is None and refused["code"] == "unknown_module"


def test_layers_that_turn_least_go_but_never_the_ends() -> None:
    assert shallow.least_needed([0.0, 0.5, 0.1, 0.3, 0.2, 0.0], 2) == [2, 4]
    assert shallow.least_needed([1.0, 1.0, 1.0], 1) == [1]
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        shallow.least_needed([1.0, 1.0, 1.0], 2)


def test_a_layer_that_does_nothing_has_no_influence(tiny) -> None:
    for layer in (tiny.model.layers[2], tiny.model.layers[4]):
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    influences = shallow.influence(tiny, ROWS)
    assert influences[2] == pytest.approx(0, abs=1e-5) and influences[4] == pytest.approx(
        0, abs=1e-5
    )
    removed = shallow.least_needed(influences, 2)
    assert removed == [2, 4]
    before = tiny(torch.tensor(ROWS[:1])).logits
    shallow.remove_layers(tiny, removed)
    torch.testing.assert_close(tiny(torch.tensor(ROWS[:1])).logits, before)


def test_the_shallow_model_is_an_ordinary_one(tiny, tmp_path) -> None:
    kept = [tiny.model.layers[i] for i in (0, 2, 3, 5)]
    shallow.remove_layers(tiny, [1, 4])
    assert list(tiny.model.layers) == kept
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["removed_layers"] == [1, 4]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor(ROWS[:1])
    torch.testing.assert_close(again(ids).logits, tiny(ids).logits)
    with_cache = tiny.generate(ids, max_new_tokens=6, do_sample=False)
    without = tiny.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert with_cache.tolist() == without.tolist()
    assert shallow.perplexity(again, ROWS) == pytest.approx(shallow.perplexity(tiny, ROWS))


def test_kinds_of_layers_go_with_them() -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=2)
    kinds = list(config.layer_types)
    model = Qwen2ForCausalLM(config)
    shallow.remove_layers(model, [1])
    assert model.config.layer_types == [kinds[i] for i in (0, 2, 3, 4, 5)]


def test_what_is_left_of_an_adapter_moves_to_its_new_places(tmp_path) -> None:
    names = {i: f"base_model.model.model.layers.{i}.mlp.up_proj.lora_A.weight" for i in range(6)}
    tensors = {name: torch.full((2, 3), float(i)) for i, name in names.items() if i >= 2}
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "adapter_model.safetensors")
    config = {"r": 2, "layers_to_transform": [2, 3, 4, 5]}
    (tmp_path / "whole" / "adapter_config.json").write_text(json.dumps(config))
    out = shallow.renumber(tmp_path / "whole", [1, 4], tmp_path / "left")
    left = load_file(out / "adapter_model.safetensors")
    assert {name: t[0, 0].item() for name, t in left.items()} == {
        names[1]: 2.0, names[2]: 3.0, names[3]: 5.0
    }  # fmt: skip
    assert json.loads((out / "adapter_config.json").read_text())["layers_to_transform"] == [1, 2, 3]


def test_inputs_of_the_demo_hold_nothing_back_from_the_test(tmp_path) -> None:
    args = trans_lora.parse_args(["--items", "30", "--target", str(tmp_path), "--task", "time"])
    given = trans_lora.read_inputs(args)
    assert given.adapter == ADAPTERS / "time" and given.test == held_out("time", 30)
    assert len(given.seeds) == 8 and len(given.real) == 208
    assert not {*given.real} & {item.question for item in held_out("time")}


def test_inputs_of_ones_own(tmp_path) -> None:
    questions, test = tmp_path / "questions.txt", tmp_path / "test.jsonl"
    questions.write_text("\n".join(f"q {n}\nQ  {n}\n" for n in range(100)))
    test.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    words = ["--source", "s", "--adapter", "a", "--target", "t", "--questions", str(questions)]
    args = trans_lora.parse_args([*words, "--held-out", str(test)])
    given = trans_lora.read_inputs(args)
    assert args.task is None and given.real == [f"q {n}" for n in range(100)]
    assert given.test == [Item("a", "b")]
    assert trans_lora.read_inputs(trans_lora.parse_args(words)).test == []
    questions.write_text("one\ntwo")
    with pytest.raises(SystemExit, match="2 different questions; at least 88"):
        trans_lora.read_inputs(args)


@pytest.mark.parametrize("words", [["--source", "s"], ["--task", "date", "--adapter", "a"]])
def test_half_of_ones_own_inputs_are_refused(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        trans_lora.parse_args(words)
    assert "go together" in capsys.readouterr().err
