"""Kinds of adapters × features of the engine: each cell right (a number), or refused (a code).

`make matrix` runs every column and writes docs/matrix.json down, of which docs/matrix.md is made;
CI runs those that share one engine. Columns that other tests prove stand in
`scripts/matrix_page.py`, by these tests' names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from integration_tests import matrix
from integration_tests.engines import close, make_engine, tokens
from integration_tests.matrix import Record, Row
from integration_tests.reference_model import logits
from integration_tests.server import base_with_tokenizer, command, free_port, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
whole = pytest.mark.skipif(
    matrix.WHERE not in os.environ, reason="an engine of its own: `make matrix`"
)
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
    """Compiled, chunked, drafts by n-gram, and a tokenizer: what the columns of CI share."""
    llm = make_engine(
        base, skip_tokenizer_init=False, speculative_config=NGRAM, disable_log_stats=False,
        max_num_batched_tokens=96,
    )  # fmt: skip
    matrix.load(llm)
    yield llm
    close(llm)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """The column is the test's first line of documentation."""
    return Record(request.function.__doc__.splitlines()[0].rstrip("."), request.node.nodeid)


def test_ngram(drafting: Any, rows: dict[str, Row], record: Record) -> None:
    """Speculative decoding, n-gram."""
    cases = matrix.every(rows)
    before = drafted(drafting)
    for again in (False, True):  # cold, then from the prefix cache
        outputs = matrix.answer(drafting, cases, skip_reading_prefix_cache=not again)
        record.right(matrix.errors(rows, outputs))
    count, taken = (a - b for a, b in zip(drafted(drafting), before, strict=True))
    assert count > 50 and taken > 0, "nothing was drafted, or nothing taken"
    record.right(matrix.errors(rows, outputs), f"{taken} of {count} drafts taken")
    record.close()


def drafted(llm: Any) -> tuple[int, int]:
    """Tokens that were drafted since the start, and how many of them were taken."""
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    return tuple(int(found[f"vllm:spec_decode_{name}"]) for name in names)  # type: ignore[return-value]


def test_several_answers(llama: Any, rows: dict[str, Row], record: Record) -> None:
    """Several answers (n).

    Not while drafting: stock 0.32 ends an engine on a CPU that samples by top-k and has no draft.
    """
    from vllm import SamplingParams

    matrix.load(llama)
    cases = matrix.every(rows)
    params = [
        SamplingParams(
            n=3, temperature=1.0, top_k=1, max_tokens=len(c.answer), ignore_eos=True, logprobs=-1,
            extra_args={"lora_ext": c.says} if c.says else None,
        )
        for c in cases
    ]  # fmt: skip
    outputs = llama.generate(
        [{"prompt_token_ids": c.prompt} for c in cases], params,
        lora_request=[c.adapter for c in cases], use_tqdm=False,
    )  # fmt: skip
    worst = [matrix.errors(rows, outputs, choice) for choice in range(3)]
    record.right({name: max(w[name] for w in worst) for name in rows})
    record.close()


ALLOWED = range(100, 200)


def test_structured_output(drafting: Any, rows: dict[str, Row], record: Record) -> None:
    """Structured output."""
    from vllm.sampling_params import StructuredOutputsParams

    cases = matrix.every(rows)
    shape = StructuredOutputsParams(regex=r"(<1\d\d>){6}<1\d\d>*")
    got = matrix.answer(drafting, cases, structured_outputs=shape)
    want = matrix.answer(drafting, cases, allowed_token_ids=list(ALLOWED))
    left = iter(zip(got, want, strict=True))
    for name, row in rows.items():
        pairs = [next(left) for _ in row.cases]
        same = all(tokens(a)[:6] == tokens(b)[:6] for a, b in pairs)
        assert all(set(tokens(a)[:6]) <= set(ALLOWED) for a, _ in pairs)
        record.right({name: 0.0 if same else float("inf")})
    record.close()


WIDTH, STEPS = 3, 4


def test_beam_search(drafting: Any, rows: dict[str, Row], record: Record) -> None:
    """Beam search."""
    from vllm.sampling_params import BeamSearchParams

    asked = {name: row for name, row in rows.items() if row.plain}
    cases = matrix.every(asked)
    outputs = drafting.beam_search(
        [{"prompt_token_ids": c.prompt} for c in cases],
        BeamSearchParams(beam_width=WIDTH, max_tokens=STEPS, ignore_eos=True),
        lora_request=[c.adapter for c in cases],
    )  # fmt: skip
    left = iter(outputs)
    for name, row in asked.items():
        for case in row.cases:
            got = [(s.tokens[len(case.prompt) :], s.cum_logprob) for s in next(left).sequences]
            want = beams(case.prompt, row.reference)
            same = [t for t, _ in got] == [t for t, _ in want]
            apart = max(abs(a - b) for (_, a), (_, b) in zip(got, want, strict=True))
            record.right({name: apart if same else float("inf")})
    others = [name for name, row in rows.items() if not row.plain]
    record.other("not testable here", "offline beam search carries no `extra_args`", *others)
    record.close()


def beams(prompt: list[int], adapter: Any) -> list[tuple[list[int], float]]:
    """Beam search by transformers: the likeliest `WIDTH` continuations of each step go on."""
    kept: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(STEPS):
        grown = []
        for ids, total in kept:
            row_V = torch.log_softmax(logits(matrix.BASE, adapter, prompt + ids)[-1], -1)
            top = row_V.topk(2 * WIDTH)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            grown += [([*ids, token], total + value) for token, value in pairs]
        kept = sorted(grown, key=lambda found: -found[1])[:WIDTH]
    return kept


COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "draft model": (
        "Speculative decoding, draft model",
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
    ),
    "pp2": (
        "Pipeline parallel, 2 ranks",
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    ),
}


@whole
def test_kv_connector(rows: dict[str, Row], record: Record, tmp_path: Path) -> None:
    """KV connector (files named by block hashes)."""
    transfer = {
        "kv_connector": "HashedConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "integration_tests.kv_connector",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is here, to be asked
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
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        close(llm)
    record.close()


@whole
def test_data_parallel(rows: dict[str, Row], request: Any, tmp_path: Path) -> None:
    """Two engines behind one server; each must have every adapter."""
    node = request.node.nodeid
    answers, beams = Record("Data parallel 2, over HTTP", node), Record("Beam search, HTTP", node)
    server = command(
        base_with_tokenizer(tmp_path / matrix.BASE), free_port(), None,
        "--data-parallel-size", "2", "--enforce-eager", "--max-loras", "4", "--max-cpu-loras", "16",
        "--lora-modules", *(f"{name}={path}" for name, path in matrix.adapters(rows).items()),
    )  # fmt: skip
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    cases = matrix.every(rows)
    with serving(server, tmp_path / "server.log", **bind) as running:
        with ThreadPoolExecutor(8) as pool:
            for record, more in ((answers, {}), (beams, {"use_beam_search": True})):
                got = list(pool.map(lambda c, m=more: posted(running, c, m), cases))
                left = iter(got)
                record.right({
                    name: max(matrix.http_error(c, next(left)) for c in row.cases)
                    for name, row in rows.items()
                })  # fmt: skip
        used = engines_used(httpx.get(f"{running.url}/metrics", trust_env=False).text)
    assert len(used) == 2 and min(used) > 5, f"one engine did all: {used}"
    for record in (answers, beams):
        record.close()


def posted(server: Any, case: Any, more: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a greedy completion."""
    body = {
        "model": case.adapter.lora_name if case.adapter else "base", "prompt": case.prompt,
        "max_tokens": len(case.answer), "temperature": 0, "logprobs": 5, "ignore_eos": True,
        "return_token_ids": True, **more, **({"lora_ext": case.says} if case.says else {}),
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def engines_used(metrics: str) -> list[int]:
    """Requests that each engine has answered."""
    found: dict[str, float] = {}
    for engine, count in re.findall(
        r'^vllm:request_success_total\{engine="(\d+)"[^}]*\} ([\d.]+)', metrics, re.MULTILINE
    ):
        found[engine] = found.get(engine, 0) + float(count)
    return sorted(int(count) for count in found.values())


@whole
@pytest.mark.parametrize("column", COLUMNS)
def test_an_engine_of_its_own(
    column: str, base: Path, rows: dict[str, Row], request: pytest.FixtureRequest
) -> None:
    """Options that an engine is started with."""
    title, options = COLUMNS[column]
    record = Record(title, request.node.nodeid)
    if "speculative_config" in options:
        drafter = {"speculative_config": options["speculative_config"] | {"model": str(base)}}
        options = options | drafter
    llm = make_engine(base, enforce_eager=True, **options)
    try:
        matrix.load(llm)
        for again in (False, True):
            outputs = matrix.answer(llm, matrix.every(rows), skip_reading_prefix_cache=not again)
            record.right(matrix.errors(rows, outputs))
    finally:
        close(llm)
    record.close()
