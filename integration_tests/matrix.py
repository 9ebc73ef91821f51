"""The rows of the matrix: one kind of adapter each, in requests whose answers are known.

Every column of `test_matrix` asks an engine all of them in one batch. What comes out is written
down (`Record`), and `scripts/matrix_page.py` makes the page of it.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from integration_tests import conditioned
from integration_tests import followed as made_for
from integration_tests.conditioned import Case
from integration_tests.engines import base_path, engine_options, lora, recorded, worst
from integration_tests.followed import followed
from integration_tests.reference_model import model
from integration_tests.server import Server
from tests import dora_folders
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Term, load_factors, merge, save_peft

BASE, VOCABULARY, BOUND = "base_llama", 512, 2e-3
WHERE = "VLLM_LORA_EXT_MATRIX"  # the file that results are written to
whole = pytest.mark.skipif(WHERE not in os.environ, reason="an engine of its own: `make matrix`")
SHARED_NODE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
XLORA = ("xlora_topk-a", "xlora_lw_topk-a")


@dataclass(frozen=True)
class Row:
    """One kind of adapter.

    Args:
        plain: whether a request says no more than the adapter's name.
    """

    cases: Sequence[Case]
    plain: bool = True


def of_fixture(name: str) -> Row:
    """The authors' numbers: log-probabilities after the prompt, and their greedy tokens."""
    fx = recorded(name)
    request = lora(name, fx.folder)
    cases = [
        Case(f"{name} {i}", fx.prompts[i], fx.greedy[i], fx.logits[i][-1:], request)
        for i in range(1, len(fx.prompts))
    ]
    return Row(cases)


def rows(folder: Path) -> dict[str, Row]:
    """Every row but X-LoRA's, which needs two passes (`two_pass_rows`).

    Args:
        folder: where adapters that are made here are written.
    """
    prompts = recorded("plain-a").prompts[1:3]
    base = [followed(f"base {i}", p, None, None) for i, p in enumerate(prompts)]
    conditioned_mixes = [*conditioned.mixes("scales-a"), *conditioned.mixes("spans-a")]
    spans = [c for c in conditioned_mixes if any("spans" in a for a in c.says["adapters"])]
    scales = [c for c in conditioned_mixes if c not in spans]
    made_for.write_made(folder / "made")
    return {
        "base": Row(base),
        "plain": of_fixture("plain-a"),
        "DoRA": _dora(folder / "dora", prompts),
        "merged": _merged(folder / "merged", prompts),
        "routed linear": of_fixture("loramoe-a"),
        "rank-wise": of_fixture("smora-a"),
        "MixLoRA block": of_fixture("mixlora-a"),
        "several, scaled": Row(scales[:3], plain=False),
        "spans": Row(spans[:3], plain=False),
        "Activated LoRA": Row(conditioned.aloras()[:3], plain=False),
        "user": Row(made_for.users(folder / "made"), plain=False),
        "instruction": Row(made_for.instructions(folder / "made"), plain=False),
    }


def two_pass_rows() -> dict[str, Row]:
    """What an engine serves with the setting `two_pass` only."""
    return {"X-LoRA": Row(conditioned.xloras(*XLORA), plain=False)}


@cache
def _base_model() -> Any:
    return model(BASE)


def _dora(folder: Path, prompts: Sequence[list[int]]) -> Row:
    dora_folders.make(folder, _base_model())
    adapter, request = load_adapter(folder), lora("dora", folder)
    return Row([followed(f"dora {i}", p, adapter, request) for i, p in enumerate(prompts)])


def _merged(folder: Path, prompts: Sequence[list[int]]) -> Row:
    merged(folder)
    adapter, request = load_adapter(folder), lora("merged", folder)
    return Row([followed(f"merged {i}", p, adapter, request) for i, p in enumerate(prompts)])


def merged(folder: Path) -> None:
    """Two adapters of the fixture, by TIES."""
    parts = conditioned.FIXTURES / "conditioned" / "scales-a" / "adapters"
    terms = [Term(load_factors(parts / name), 0.7, name) for name in ("red", "green")]
    save_peft(merge("ties", terms, {"rank": 8}).factors, folder)


def load(llm: Any) -> None:
    """What requests name beside their own adapter."""
    conditioned.load(llm)


def answer(llm: Any, cases: Sequence[Case], **more: Any) -> list[Any]:
    """All in one batch, greedy, with every log-probability."""
    return conditioned.ask(llm, list(cases), **more)


def adapters(found: Mapping[str, Row]) -> dict[str, str]:
    """Name → folder of all that requests name."""
    named = [c.adapter for c in every(found) if c.adapter is not None]
    named += [
        conditioned.adapter(name, part)
        for name in ("spans-a", "scales-a")
        for part in ("red", "green", "blue")
    ]
    return {a.lora_name: a.lora_path for a in named}


def posted(server: Server, case: Case, **more: Any) -> dict[str, Any]:
    """The one choice of a greedy completion, over HTTP."""
    (choice,) = choices(server, case, **more)
    return choice


def choices(server: Server, case: Case, **more: Any) -> list[dict[str, Any]]:
    body = {
        "model": case.adapter.lora_name if case.adapter else "base", "prompt": case.prompt,
        "max_tokens": len(case.answer), "temperature": 0, "logprobs": 5, "ignore_eos": True,
        "return_token_ids": True, **more, **({"lora_ext": case.says} if case.says else {}),
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


def http_error(case: Case, choice: dict[str, Any]) -> float:
    """As `error`, of the log-probabilities that an HTTP answer has: those of its own tokens."""
    if choice["token_ids"] != case.answer:
        return float("inf")
    logp = torch.log_softmax(case.logits.double(), -1)
    got = (choice.get("logprobs") or {}).get("token_logprobs") or []
    pairs = zip(got, logp, case.answer, strict=False)
    return max((abs(value - row[token].item()) for value, row, token in pairs), default=0.0)


def error(case: Case, output: Any, choice: int = 0) -> float:
    """Largest difference of a log-probability; infinite where a token differs."""
    made = output.outputs[choice]
    if list(made.token_ids)[: len(case.answer)] != case.answer:
        return float("inf")
    got = torch.full(case.logits.shape, float("nan"))
    for i, row in enumerate(made.logprobs[: len(case.logits)]):
        for token, entry in row.items():
            got[i, token] = entry.logprob
    return worst(got, case.logits)


def errors(found: Mapping[str, Row], outputs: Sequence[Any], choice: int = 0) -> dict[str, float]:
    """Of each row the largest; outputs in the order of `every`."""
    left = iter(outputs)
    return {
        name: max(error(case, next(left), choice) for case in row.cases)
        for name, row in found.items()
    }


def every(found: Mapping[str, Row]) -> list[Case]:
    return [case for row in found.values() for case in row.cases]


@dataclass
class Record:
    """What one column has shown, row by row.

    Args:
        column: its name on the page; test: the test that asks.
        bound: of a difference that is still right.
    """

    column: str
    test: str
    bound: float = BOUND
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def right(self, numbers: Mapping[str, float], note: str = "") -> None:
        """Rows that were asked, and how far their numbers are off; the worst of all calls."""
        for row, number in numbers.items():
            number = max(number, self.cells.get(row, {}).get("number", 0.0))
            state = "right" if number < self.bound else "wrong"
            self.cells[row] = {"state": state, "number": number}
            if note:
                self.cells[row]["note"] = note

    def other(self, state: str, why: str, *names: str) -> None:
        """Rows that are `refused` (why: the code), or `not testable here`."""
        for row in names:
            self.cells[row] = {"state": state, "why": why}

    def close(self) -> None:
        """Writes the column down where somebody asks for it, and fails where a cell is wrong."""
        for row, cell in self.cells.items():
            print(f"{self.column} | {row}: {cell}")
        if path := os.environ.get(WHERE):
            _write(Path(path), self)
        wrong = {row: c for row, c in self.cells.items() if c["state"] == "wrong"}
        assert not wrong, wrong


def refuse_two_passes(record: Record, base: str | Path = BASE, **options: Any) -> None:
    """An engine with these options does not start when it is to serve X-LoRA."""
    from vllm import EngineArgs

    two_pass = {"additional_config": {"lora_ext": {"two_pass": True}}}
    with pytest.raises(AdapterError) as caught:
        EngineArgs(**engine_options(base, **two_pass, **options)).create_engine_config()
    record.other("refused", caught.value.code, "X-LoRA")


def _write(path: Path, record: Record) -> None:
    """Into the file of all columns; those that were not run stay."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[record.column] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "vllm": version("vllm"), "plugin": version("vllm-lora-ext"), "test": record.test,
        "cells": record.cells,
    }  # fmt: skip
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def with_tokenizer(folder: Path) -> Path:
    """The base with a tokenizer of one word per token, all of one length: token 17 is `<017>`."""
    import shutil

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(base_path(BASE), folder)
    words = {f"<{i:03}>": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<000>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<000>", eos_token="<002>", bos_token="<001>"
    )
    fast.save_pretrained(folder)
    return folder


def eagle_head(base: Path, folder: Path) -> Path:
    """One layer that takes the base's last hidden state on, a little disturbed, as its own."""
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 1}
    whole_base = load_file(base / "model.safetensors")
    of_layer = "model.layers.0."
    tensors = {
        name.removeprefix("model."): weight * (0.1 if "o_proj" in name or "down" in name else 1)
        for name, weight in whole_base.items()
        if name.startswith(of_layer) and "input_layernorm" not in name
    }
    size = config["hidden_size"]
    tensors["fc.weight"] = torch.cat([0.1 * torch.eye(size), torch.eye(size)], dim=1)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
