"""Kinds of adapters × vLLM's own options of LoRA; `make matrix`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests import matrix
from integration_tests.conditioned import Case
from integration_tests.engines import close, lora, make_engine
from integration_tests.followed import ANSWER, followed
from integration_tests.matrix import Record, Row
from integration_tests.reference_model import model
from tests import dora_folders
from vllm_lora_ext.adapters import load_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), matrix.whole]
TARGETS = ["o_proj", "down_proj"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    return matrix.rows(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    return Record(request.function.__doc__.splitlines()[0].rstrip("."), request.node.nodeid)


def asked(llm: Any, rows: dict[str, Row], record: Record) -> None:
    """Cold, then from the prefix cache."""
    for again in (False, True):
        outputs = matrix.answer(llm, matrix.every(rows), skip_reading_prefix_cache=not again)
        record.right(matrix.errors(rows, outputs))


def test_target_modules(rows: dict[str, Row], record: Record, tmp_path: Path) -> None:
    """`--lora-target-modules`, adapters of other layers too."""
    prompts = [case.prompt for case in rows["base"].cases]
    own = rows["routed linear"].cases[0].adapter
    routed = load_adapter(own.lora_path)
    left = {n: m for n, m in routed.modules.items() if n.endswith(tuple(TARGETS))}
    assert 0 < len(left) < len(routed.modules)
    narrowed, own = replace(routed, modules=left), lora("narrowed", own.lora_path)
    found = {
        "base": rows["base"],
        "plain": Row(of_peft(tmp_path / "all", prompts)),
        "routed linear": Row([followed("routed", p, narrowed, own) for p in prompts]),
    }
    llm = make_engine(matrix.BASE, enforce_eager=True, lora_target_modules=TARGETS)
    try:
        asked(llm, found, record)
    finally:
        close(llm)
    record.close()


def of_peft(folder: Path, prompts: list[list[int]]) -> list[Case]:
    """A LoRA on all linears as PEFT saves it, and PEFT's numbers with only the targets on."""
    tuned = dora_folders.make(folder, model(matrix.BASE), use_dora=False)
    for name, weight in tuned.named_parameters():
        if ".lora_B." in name and not any(f".{target}." in name for target in TARGETS):
            weight.data.zero_()
    cases, adapter = [], lora("all", folder)
    for i, prompt in enumerate(prompts):
        ids, found = list(prompt), []
        for _ in range(ANSWER):
            with torch.no_grad():
                found.append(tuned(torch.tensor([ids])).logits[0, -1])
            ids.append(int(found[-1].argmax()))
        cases.append(Case(f"all {i}", prompt, ids[len(prompt) :], torch.stack(found), adapter))
    return cases


def test_fully_sharded_and_compiled(
    rows: dict[str, Row], record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--fully-sharded-loras`, two ranks, compiled."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the ranks share a NUMA node
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = make_engine(
        matrix.BASE, tensor_parallel_size=2, distributed_executor_backend="mp",
        fully_sharded_loras=True,
    )  # fmt: skip
    try:
        matrix.load(llm)
        with pytest.raises(Exception, match="unsupported_feature"):
            llm.llm_engine.add_lora(rows["DoRA"].cases[0].adapter)
        record.other("refused", "unsupported_feature", "DoRA")
        asked(llm, {name: row for name, row in rows.items() if name != "DoRA"}, record)
    finally:
        close(llm)
    record.close()
