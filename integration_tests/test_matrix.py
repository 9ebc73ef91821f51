"""Kinds of adapters × features of the engine: each cell right (a number), or refused (a code).

`make matrix` runs every column and writes docs/matrix.json down, of which docs/matrix.md is made;
CI runs the one that shares its engine with other tests. Columns that other tests prove stand in
`scripts/matrix_page.py`, by these tests' names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests import beams, matrix
from integration_tests.conftest import TWO_PASS
from integration_tests.engines import close, make_engine, tokens
from integration_tests.matrix import Record, Row
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.model_patches import conditioned as conditioned_core

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: Any) -> dict[str, Row]:
    return matrix.rows(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return matrix.with_tokenizer(tmp_path_factory.mktemp("base") / matrix.BASE)


@pytest.fixture(scope="module")
def drafting(base: Path) -> Iterator[Any]:
    """Compiled, chunked, drafts by n-gram, and a tokenizer."""
    llm = make_engine(
        base, skip_tokenizer_init=False, speculative_config=NGRAM, disable_log_stats=False,
        max_num_batched_tokens=96,
    )  # fmt: skip
    matrix.load(llm)
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def two_pass_rows() -> dict[str, Row]:
    return matrix.two_pass_rows()


@pytest.fixture(scope="module")
def two_pass(base: Path) -> Iterator[Any]:
    """As `drafting`, but that two passes and drafts exclude each other."""
    llm = make_engine(
        base, skip_tokenizer_init=False, max_num_batched_tokens=96, additional_config=TWO_PASS
    )
    yield llm
    close(llm)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """The column is the test's first line of documentation."""
    return Record(request.function.__doc__.splitlines()[0].rstrip("."), request.node.nodeid)


@matrix.whole
def test_ngram(
    drafting: Any, rows: dict[str, Row], two_pass_rows: dict[str, Row], record: Record
) -> None:
    """Speculative decoding, n-gram."""
    cases = matrix.every(rows)
    before = drafted(drafting)
    for again in (False, True):  # cold, then from the prefix cache
        outputs = matrix.answer(drafting, cases, skip_reading_prefix_cache=not again)
        record.right(matrix.errors(rows, outputs))
    count, taken = (a - b for a, b in zip(drafted(drafting), before, strict=True))
    assert count > 50 and taken > 0, "nothing was drafted, or nothing taken"
    record.right(matrix.errors(rows, outputs), f"{taken} of {count} drafts taken")
    matrix.refuse_two_passes(record, speculative_config=NGRAM)
    record.close()


def drafted(llm: Any) -> tuple[int, int]:
    """Tokens that were drafted since the start, and how many of them were taken."""
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    return tuple(int(found[f"vllm:spec_decode_{name}"]) for name in names)  # type: ignore[return-value]


def test_several_answers(
    llama_eager: Any, rows: dict[str, Row], two_pass_rows: dict[str, Row], record: Record
) -> None:
    """Several answers (n).

    Not while drafting: stock 0.32 ends an engine on a CPU that samples by top-k and has no draft.
    """
    from vllm import SamplingParams

    matrix.load(llama_eager)
    rows = rows | two_pass_rows
    cases = matrix.every(rows)
    params = [
        SamplingParams(
            n=3, temperature=1.0, top_k=1, max_tokens=len(c.answer), ignore_eos=True, logprobs=-1,
            extra_args={"lora_ext": c.says} if c.says else None,
        )
        for c in cases
    ]  # fmt: skip
    outputs = llama_eager.generate(
        [{"prompt_token_ids": c.prompt} for c in cases], params,
        lora_request=[c.adapter for c in cases], use_tqdm=False,
    )  # fmt: skip
    worst = [matrix.errors(rows, outputs, choice) for choice in range(3)]
    record.right({name: max(w[name] for w in worst) for name in rows})
    record.close()


ALLOWED = range(100, 200)


@matrix.whole
def test_structured_output(
    drafting: Any, two_pass: Any, rows: dict[str, Row], two_pass_rows: dict[str, Row],
    record: Record,
) -> None:  # fmt: skip
    """Structured output."""
    shaped(drafting, rows, record)
    shaped(two_pass, two_pass_rows, record)
    record.close()


def shaped(llm: Any, rows: dict[str, Row], record: Record) -> None:
    """By a grammar, against the same requests with only the tokens that it allows."""
    from vllm.sampling_params import StructuredOutputsParams

    cases = matrix.every(rows)
    shape = StructuredOutputsParams(regex=r"(<1\d\d>){6}<1\d\d>*")
    got = matrix.answer(llm, cases, structured_outputs=shape)
    want = matrix.answer(llm, cases, allowed_token_ids=list(ALLOWED))
    left = iter(zip(got, want, strict=True))
    for name, row in rows.items():
        pairs = [next(left) for _ in row.cases]
        same = all(tokens(a)[:6] == tokens(b)[:6] for a, b in pairs)
        assert all(set(tokens(a)[:6]) <= set(ALLOWED) for a, _ in pairs)
        record.right({name: 0.0 if same else float("inf")})


@matrix.whole
def test_beam_search(
    drafting: Any, two_pass: Any, rows: dict[str, Row], two_pass_rows: dict[str, Row],
    record: Record,
) -> None:  # fmt: skip
    """Beam search."""
    asked = {name: row for name, row in rows.items() if row.plain}
    searched(drafting, asked, record)
    searched(two_pass, two_pass_rows, record)
    others = [name for name in rows if name not in asked]
    record.other("not testable here", "offline beam search carries no `extra_args`", *others)
    record.close()


def searched(llm: Any, rows: dict[str, Row], record: Record) -> None:
    """Against transformers."""
    from vllm.sampling_params import BeamSearchParams

    cases = matrix.every(rows)
    outputs = llm.beam_search(
        [{"prompt_token_ids": c.prompt} for c in cases],
        BeamSearchParams(beam_width=beams.WIDTH, max_tokens=beams.STEPS, ignore_eos=True),
        lora_request=[c.adapter for c in cases],
    )  # fmt: skip
    left = iter(outputs)
    for name, row in rows.items():
        for case in row.cases:
            output = next(left)
            got = [(s.tokens[len(case.prompt) :], s.cum_logprob) for s in output.sequences]
            version = case.adapter and llm.llm_engine.adapter_version(case.adapter)
            assert output.adapter_version == version and version != ""
            adapter = case.adapter and load_adapter(case.adapter.lora_path)
            record.right({name: beams.apart(got, beams.by_transformers(case.prompt, adapter))})


COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "draft model": (
        "Speculative decoding, draft model",
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
    ),
    "eagle": (
        "Speculative decoding, EAGLE head",
        {"speculative_config": {"method": "eagle", "num_speculative_tokens": 3}},
    ),
    "chunks": (
        "Eager, chunks of 32, cold and from the prefix cache",
        {"max_num_batched_tokens": 32, "additional_config": TWO_PASS},
    ),
    "pp2": (
        "Pipeline parallel, 2 ranks",
        # Without a compiler vLLM 0.32 warms nothing up on a CPU: its second rank has no buffers.
        {
            "pipeline_parallel_size": 2, "distributed_executor_backend": "mp",
            "enforce_eager": False,
        },
    ),
}  # fmt: skip


@matrix.whole
def test_kv_connector(
    rows: dict[str, Row], two_pass_rows: dict[str, Row], record: Record, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """KV connector (files named by block hashes)."""
    # One that is not known to go by block hashes gets no request whose blocks differ by token.
    known = conditioned_core._KEYED
    monkeypatch.setattr(conditioned_core, "_KEYED", known | {"HashedConnector"})
    transfer = {
        "kv_connector": "HashedConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "integration_tests.kv_connector",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip
    # The scheduler is here, to be asked.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = make_engine(
        matrix.BASE, enforce_eager=True, kv_transfer_config=transfer, max_num_batched_tokens=2048
    )
    try:
        matrix.load(llm)
        for _ in range(2):  # written, then read
            outputs = matrix.answer(llm, matrix.every(rows))
            taken = llm.llm_engine.engine_core.engine_core.scheduler.connector.taken
            record.right(matrix.errors(rows, outputs), f"{taken} tokens came from files")
            assert llm.reset_prefix_cache()
        assert taken > 200, "nothing came from files"
    finally:
        close(llm)
    matrix.refuse_two_passes(record, kv_transfer_config=transfer)
    record.close()


@matrix.whole
def test_second_runner(record: Record, tmp_path: Path) -> None:
    """Model runner V2, its kernels interpreted."""
    command = [sys.executable, "-m", "integration_tests.second_runner", str(tmp_path / "errors")]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    subprocess.run(command, check=True, cwd=root, env=environment, timeout=800)
    for errors in json.loads((tmp_path / "errors").read_text()):
        record.right(errors)
    record.close()


@matrix.whole
@pytest.mark.parametrize("column", COLUMNS)
def test_an_engine_of_its_own(
    column: str, base: Path, rows: dict[str, Row], two_pass_rows: dict[str, Row],
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Options that an engine is started with."""
    title, options = COLUMNS[column]
    record = Record(title, request.node.nodeid)
    drafts = options.get("speculative_config")
    if drafts:
        model = matrix.eagle_head(base, tmp_path / "head") if column == "eagle" else base
        options = options | {"speculative_config": drafts | {"model": str(model)}}
    if "additional_config" in options:
        rows = rows | two_pass_rows
    else:
        matrix.refuse_two_passes(record, **options)
    if column == "pp2":
        for name, value in matrix.SHARED_NODE.items():
            monkeypatch.setenv(name, value)
    llm = make_engine(base, **{"enforce_eager": True, "disable_log_stats": False} | options)
    try:
        matrix.load(llm)
        for again in (False, True):
            outputs = matrix.answer(llm, matrix.every(rows), skip_reading_prefix_cache=not again)
            record.right(matrix.errors(rows, outputs))
        if drafts:
            count, taken = drafted(llm)
            assert count > 50
            record.right(matrix.errors(rows, outputs), f"{taken} of {count} drafts taken")
    finally:
        close(llm)
    record.close()
