"""Kinds of adapters × servers that the matrix needs; `make matrix`."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from integration_tests import beams, matrix
from integration_tests.conditioned import Case
from integration_tests.conftest import TWO_PASS
from integration_tests.matrix import SHARED_NODE, Record, Row
from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving
from vllm_lora_ext.adapters import load_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), matrix.whole]

NOTE = f"{beams.WIDTH} beams where a request says no more than its adapter's name, one elsewhere"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    return matrix.rows(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    return Record(request.function.__doc__.splitlines()[0].rstrip("."), request.node.nodeid)


def asked_over_http(
    running: Server, rows: dict[str, Row], record: Record, **more: Any
) -> None:  # fmt: skip
    """Greedy completions, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        cases = matrix.every(rows)
        left = iter(list(pool.map(lambda case: matrix.posted(running, case, **more), cases)))
    record.right({
        name: max(matrix.http_error(case, next(left)) for case in row.cases)
        for name, row in rows.items()
    })  # fmt: skip


def served(rows: dict[str, Row], folder: Path, settings: Any, *flags: str) -> list[str]:
    """The command of a server with every adapter that requests name."""
    return command(
        base_with_tokenizer(folder / matrix.BASE), free_port(), settings, "--enforce-eager",
        "--max-loras", "4", "--max-cpu-loras", "16", *flags,
        "--lora-modules", *(f"{name}={path}" for name, path in matrix.adapters(rows).items()),
    )  # fmt: skip


def test_data_parallel(rows: dict[str, Row], record: Record, tmp_path: Path) -> None:
    """Data parallel 2, over HTTP.

    Two engines behind one server; each must have every adapter.
    """
    server = served(rows, tmp_path, None, "--data-parallel-size", "2")
    with serving(server, tmp_path / "server.log", **SHARED_NODE) as running:
        asked_over_http(running, rows, record)
        used = engines_used(httpx.get(f"{running.url}/metrics", trust_env=False).text)
    assert len(used) == 2 and min(used) > 5, f"one engine did all: {used}"
    matrix.refuse_two_passes(record, data_parallel_size=2)
    record.close()


def test_beam_search_over_http(rows: dict[str, Row], record: Record, tmp_path: Path) -> None:
    """Beam search, HTTP.

    Several beams against transformers; one, which is a greedy answer, where a request says more
    than its adapter's name.
    """
    rows = rows | matrix.two_pass_rows()
    said = {name: row for name, row in rows.items() if not row.plain and name != "X-LoRA"}
    server = served(rows, tmp_path, TWO_PASS["lora_ext"])
    with serving(server, tmp_path / "server.log") as running:
        asked_over_http(running, said, record, use_beam_search=True)
        for name, case in [(n, c) for n, row in rows.items() if n not in said for c in row.cases]:
            record.right({name: beam_error(running, case)}, NOTE)
    record.close()


def beam_error(server: Server, case: Case) -> float:
    """Largest difference of a beam's log-probability; infinite where tokens differ."""
    more = {"use_beam_search": True, "n": beams.WIDTH, "max_tokens": beams.STEPS}
    choices = matrix.choices(server, case, **more)
    got = [(c["token_ids"], sum(c["logprobs"]["token_logprobs"])) for c in choices]
    adapter = case.adapter and load_adapter(case.adapter.lora_path)
    return beams.apart(got, beams.by_transformers(case.prompt, adapter))


def engines_used(metrics: str) -> list[int]:
    """Requests that each engine has answered."""
    found: dict[str, float] = {}
    for engine, count in re.findall(
        r'^vllm:request_success_total\{engine="(\d+)"[^}]*\} ([\d.]+)', metrics, re.MULTILINE
    ):
        found[engine] = found.get(engine, 0) + float(count)
    return sorted(int(count) for count in found.values())
