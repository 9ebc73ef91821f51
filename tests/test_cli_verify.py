"""`verify` without an engine: transformers, prompts, tolerance; and the arithmetic of comparing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from make_adapters import BASE_LLAMA, BASE_QWEN2, FIXTURES
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_lora_ext import verify
from vllm_lora_ext.adapters import RoutedAdapter, load_adapter, write_native
from vllm_lora_ext.cli import app
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.verify import NEW_TOKENS, Comparison, Sequence, Verdict, compare

ROUTED = FIXTURES / "routed"
BASES = {"base_llama": BASE_LLAMA, "base_qwen2": BASE_QWEN2}


def good(name: str) -> Path:
    return ROUTED / name / "adapter"


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


def usage_error(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exit_code == 2
    return " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("name", ["alora-a", "mmlora-a"])
def test_verify_of_adapters_that_act_on_some_tokens(name: str) -> None:
    folder = FIXTURES / "conditioned" / name
    base = json.loads((folder / "meta.json").read_text())["base"]
    code, found = run(folder / "adapter", "--base", FIXTURES / "bases" / base)
    assert (code, found["ok"], found["largest"]) == (0, True, 0.0)
    assert found["effect"] > 0.1  # the prompts hold the invocation


def test_what_is_made_for_a_request_cannot_be_verified_without_one() -> None:
    folder = FIXTURES / "conditioned/reclora-a/adapter"
    code, found = run(folder, "--base", FIXTURES / "bases/base_llama_mha")
    assert (code, found["error"]["code"]) == (1, "unsupported_feature")


@pytest.mark.parametrize("name", ["plain-a", "loramoe-a", "meteora-a", "mixlora-a"])
def test_verify_in_transformers(name: str) -> None:
    base = json.loads((ROUTED / name / "meta.json").read_text())["base"]
    code, found = run(good(name), "--base", BASES[base])
    assert (code, found["ok"], found["largest"]) == (0, True, 0.0)
    assert found["effect"] > 0.1
    (copy,) = found["comparisons"]
    assert (copy["what"], copy["greedy"]) == ("native copy, transformers", 1.0)
    positions = sum(length + NEW_TOKENS - 1 for length in verify.LENGTHS)
    vocabulary = 512 if base == "base_llama" else 384
    assert (found["positions"], copy["values"]) == (positions, positions * vocabulary)
    assert found["tolerance"] == 2e-3
    plain = CliRunner().invoke(app, ["verify", str(good(name)), "--base", str(BASES[base])])
    assert plain.exit_code == 0 and "within the tolerance" in plain.stdout
    assert "add --engine" in plain.stdout


def test_a_copy_that_differs_is_beyond_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(adapter: RoutedAdapter, folder: Path) -> Path:
        module = next(iter(adapter.modules.values()))
        module.b_NR.mul_(1.5)
        done = write_native(adapter, folder)
        module.b_NR.div_(1.5)
        return done

    monkeypatch.setattr(verify, "write_native", wrong)
    options = (good("loramoe-a"), "--base", BASE_LLAMA)
    code, found = run(*options)
    assert (code, found["ok"]) == (1, False)
    assert found["largest"] > 0.01
    code, again = run(*options, "--tolerance", 100)
    assert (code, again["ok"], again["tolerance"]) == (0, True, 100.0)


def test_settings_and_errors(tmp_path: Path) -> None:
    code, found = run(good("meteora-a"), "--base", BASE_QWEN2, "--set", "top_k=1")
    assert (code, found["error"]["code"]) == (1, "setting_mismatch")
    code, found = run(good("meteora-a"), "--base", BASE_LLAMA)
    assert (code, found["error"]["code"]) == (1, "wrong_base")
    code, found = run(good("plain-a"), "--base", tmp_path / "nowhere")
    assert (code, found["error"]["code"]) == (1, "not_found")


def test_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("[5, 6, 7]\n\n[8, 9]\n")
    code, found = run(good("plain-a"), "--base", BASE_LLAMA, "--prompts", file)
    assert (code, found["prompts"]) == (0, 2)
    assert found["positions"] == 3 + 2 + 2 * (NEW_TOKENS - 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("What is a LoRA?\n", "needs a tokenizer"), ("\n", "holds no prompt"),
        ("[1, -2]\n", "needs a tokenizer"), ("[]\n", "needs a tokenizer"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    options = (good("plain-a"), "--base", BASE_LLAMA, "--prompts")
    assert said in usage_error(*options, file)
    assert "No such file" in usage_error(*options, tmp_path / "none")


@pytest.mark.parametrize("text", ["{", "[1]", "2"])
def test_engine_args_must_be_an_object(text: str) -> None:
    options = (good("plain-a"), "--base", BASE_LLAMA, "--engine-args")
    assert "--engine-args" in usage_error(*options, text)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("no memory"), "engine_failed"),
        (RuntimeError(f"Worker failed: {AdapterError('bad_settings', 'no such key')}"),
         "bad_settings"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_start(
    error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**options: Any) -> None:
        assert options["max_num_seqs"] == 3
        raise error

    request = SimpleNamespace(LoRARequest=None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    options = (good("plain-a"), "--base", BASE_LLAMA, "--engine")
    status, found = run(*options, "--engine-args", '{"max_num_seqs": 3}')
    assert (status, found["error"]["code"]) == (1, code)


def test_how_far_frozen_gates_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of every X-LoRA, and no part of the verdict; a server gets what --set says in a copy."""
    served = []

    def ask(options: Any, folder: Path, *_: Any) -> list[Comparison]:
        served.append(load_adapter(folder).classifier.frozen)  # type: ignore[union-attr]
        return [Comparison("vLLM", 0.0, 1.0, 1)]

    monkeypatch.setattr("vllm_lora_ext.cli.verify._ask_engine", ask)
    folder = FIXTURES / "conditioned/xlora_flat-a/adapter"
    command = (folder, "--base", BASE_QWEN2, "--engine")
    code, found = run(*command)
    far = found["distance"]
    assert (code, found["largest"], far["positions"]) == (0, 0.0, 4 * (NEW_TOKENS - 1))
    assert "an approximation" in far["what"] and far["mean"] > 0.1
    assert run(*command, "--set", "gates=frozen")[1]["distance"] == pytest.approx(far)
    assert served == [False, True]
    shown = CliRunner().invoke(app, ["verify", *map(str, command)]).stdout
    assert "frozen at the end of the prompt, an approximation: off by" in shown


def test_verify_follows_the_recorded_logits() -> None:
    """`follow` computes what the authors' code does: logits and greedy tokens of the fixture."""
    model, adapter = verify.load_base(BASE_LLAMA), load_adapter(good("loramoe-a"))
    expected = load_file(ROUTED / "loramoe-a" / "expected.safetensors")
    prompts = [expected[f"prompt_{i}"].tolist() for i in range(2)]
    for side, key in ((adapter, "logits"), (None, "base_logits")):
        for i, sequence in enumerate(verify.follow(model, side, prompts)):
            want = expected[f"{key}_{i}"].log_softmax(-1)
            assert (sequence.logp_PV[: len(prompts[i])] - want).abs().max() < 1e-4
            if side is not None:
                assert sequence.greedy == expected[f"greedy_{i}"][:NEW_TOKENS].tolist()


def test_random_prompts_are_steady_and_repeatable() -> None:
    model, adapter = verify.load_base(BASE_QWEN2), load_adapter(good("meteora-a"))
    first = verify.random_prompts(model, adapter)
    assert first == verify.random_prompts(model, adapter)
    assert [len(prompt) for prompt in first] == list(verify.LENGTHS)
    assert all(4 <= token < 384 for prompt in first for token in prompt)


def sequence_and_answer(tokens: int = 6) -> tuple[Sequence, Any]:
    generator = torch.Generator().manual_seed(0)
    prompt = [1, 2, 3]
    logp_PV = torch.randn(len(prompt) + NEW_TOKENS - 1, tokens, generator=generator)
    logp_PV = logp_PV.log_softmax(-1)
    greedy = logp_PV[len(prompt) - 1 :].argmax(-1).tolist()
    rows = [dict(enumerate(row.tolist())) for row in logp_PV]
    return Sequence(prompt, greedy, logp_PV), (rows, list(greedy))


def test_compare_counts_every_value() -> None:
    sequence, answer = sequence_and_answer()
    same = compare("engine", [sequence], [answer])
    assert (same.largest, same.greedy, same.values) == (0.0, 1.0, 10 * 6)
    rows, _ = answer
    rows[4][2] += 0.25
    found = compare("engine", [sequence, sequence], [answer, sequence_and_answer()[1]])
    assert found.largest == pytest.approx(0.25, rel=1e-5)
    rows[4][2] = float("nan")
    assert compare("engine", [sequence], [answer]).largest == float("inf")


def test_compare_takes_the_likeliest_tokens_alone() -> None:
    sequence, (rows, tokens) = sequence_and_answer()
    top = [dict(sorted(row.items(), key=lambda item: -item[1])[:2]) for row in rows]
    found = compare("engine", [sequence], [(top, tokens)])
    assert (found.largest, found.greedy, found.values) == (0.0, 1.0, 10 * 2)


@pytest.mark.parametrize("parted", range(NEW_TOKENS))
def test_compare_stops_where_the_texts_part(parted: int) -> None:
    """After another token the engine answers another text, whatever its numbers are."""
    sequence, (rows, tokens) = sequence_and_answer()
    tokens[parted] = (tokens[parted] + 1) % 6
    for row in rows[3 + parted :]:
        row[0] += 5.0
    found = compare("engine", [sequence], [(rows, tokens)])
    assert found.largest == 0.0
    assert found.values == (3 + parted) * 6
    assert found.greedy == pytest.approx((3 + parted) / 10)


def test_a_verdict_with_nan_is_not_ok() -> None:
    def verdict(largest: float) -> Verdict:
        return Verdict("a", "s", "b", "float32", 1.0, 1, 1, 0.1, [Comparison("x", largest, 1.0, 1)])

    assert verdict(1.0).ok and not verdict(1.1).ok and not verdict(float("nan")).ok


def test_engine_options_hold_the_adapter() -> None:
    adapter = load_adapter(good("loramoe-a"))
    options = verify.engine_options("base", adapter, "bfloat16", 512, 64)
    assert (options["max_lora_rank"], options["max_logprobs"]) == (16, -1)
    assert options["max_model_len"] == 64 + NEW_TOKENS
    assert "additional_config" not in options
    assert verify.engine_options("base", adapter, "float32", 150_000, 64)["max_logprobs"] == 20
