"""Kinds of adapters × vLLM's own options of LoRA; `make matrix`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests import matrix, other_bases
from integration_tests.conditioned import Case
from integration_tests.engines import close, lora, make_engine
from integration_tests.followed import ANSWER, USERS
from integration_tests.matrix import Record, Row
from integration_tests.other_bases import Kind
from integration_tests.reference_model import model
from tests import dora_folders

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), matrix.whole]
TARGETS = ["o_proj", "down_proj"]
TWO_PASS = {"lora_ext": {"two_pass": True}}


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
    net, folder = model(matrix.BASE), tmp_path / "adapters"
    prompts = [case.prompt for case in rows["base"].cases]
    recorded = {"base": rows["base"], "plain": Row(of_peft(tmp_path / "all", prompts))}
    found = other_bases.kinds(net, dora_folders.LINEARS, folder, "all")
    found["DoRA"] = other_bases.dora(net, dora_folders.LINEARS, folder, "all")
    found["MixLoRA block"] = other_bases.mix_block(net, "model.layers.1.mlp", folder, "all")
    found["X-LoRA"] = other_bases.xlora(net, dora_folders.LINEARS, folder, "all")
    found |= other_bases.completed(net, tmp_path / "made", "all", name=USERS[1])
    llm = make_engine(
        matrix.BASE, enforce_eager=True, lora_target_modules=TARGETS, additional_config=TWO_PASS
    )
    try:
        refused = other_bases.refusals(llm, found)
        assert refused == {"MixLoRA block": "unsupported_feature"}
        other_bases.load(llm, folder, "all")
        asked(llm, recorded, record)
        narrowed = {row: only_targets(kind) for row, kind in found.items() if row not in refused}
        record.right(other_bases.errors(llm, net, narrowed, matrix.VOCABULARY))
    finally:
        close(llm)
    for row, code in refused.items():
        record.other("refused", code, row)
    record.close()


def only_targets(kind: Kind) -> Kind:
    """What is left of it."""
    wears = []
    for adapter in kind.wears:
        left = {n: m for n, m in adapter.modules.items() if n.endswith(tuple(TARGETS))}
        assert 0 < len(left) < len(adapter.modules)
        wears.append(replace(adapter, modules=left))
    return replace(kind, wears=wears)


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
        fully_sharded_loras=True, additional_config=TWO_PASS,
    )  # fmt: skip
    try:
        matrix.load(llm)
        with pytest.raises(Exception, match="unsupported_feature"):
            llm.llm_engine.add_lora(rows["DoRA"].cases[0].adapter)
        record.other("refused", "unsupported_feature", "DoRA")
        served = {name: row for name, row in rows.items() if name != "DoRA"}
        asked(llm, served | matrix.two_pass_rows(), record)
    finally:
        close(llm)
    record.close()
