"""Kinds of adapters × servers that the matrix needs; `make matrix`."""

from __future__ import annotations

import itertools
import re
import threading
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

LOADING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
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
    server = served(rows, tmp_path, None, "--data-parallel-size", "2", "--api-server-count", "1")
    with serving(server, tmp_path / "server.log", **SHARED_NODE, **LOADING) as running:
        asked_over_http(running, rows, record)
        metrics = httpx.get(f"{running.url}/metrics", timeout=60, trust_env=False).text
        used = engines_used(metrics)
        assert "lora_ext:slots 8.0" in metrics, "four of each engine"
        two = [rows[name].cases[0].adapter.lora_path for name in ("plain", "routed linear")]
        read_while_it_changes(running, two, tmp_path / "moving")
    assert len(used) == 2 and min(used) > 5, f"one engine did all: {used}"
    matrix.refuse_two_passes(record, data_parallel_size=2)
    record.close()


def read_while_it_changes(server: Server, folders: list[str], name: Path) -> None:
    """One name's folder is one of two adapters' by turns while the engines read it: whether a load
    is refused or not, all engines answer with one version."""
    name.symlink_to(folders[0])
    done = threading.Event()

    def swap() -> None:
        for folder in itertools.cycle(folders):
            other = name.with_suffix(".other")
            other.symlink_to(folder)
            other.rename(name)
            if done.wait(0.02):
                return

    def ask(_: int) -> tuple[str, list[int]]:
        body = {"model": "moving", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0,
                "return_token_ids": True}  # fmt: skip
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300, trust_env=False)
        found = answer.raise_for_status().json()
        return found["system_fingerprint"], found["choices"][0]["token_ids"]

    def load(inplace: bool) -> str:
        body = {"lora_name": "moving", "lora_path": str(name), "load_inplace": inplace}
        url = f"{server.url}/v1/load_lora_adapter"
        found = httpx.post(url, json=body, timeout=300, trust_env=False)
        return "loaded" if found.status_code == 200 else found.json()["error"]["type"]

    assert load(False) == "loaded"
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            seen = []
            while len(seen) < 30 or (len({said for said, _ in seen}) < 2 and len(seen) < 300):
                said = load(True)
                (answer,) = {(mark, *ids) for mark, ids in pool.map(ask, range(6))}
                seen.append((said, answer))
    finally:
        done.set()
        thread.join()
    assert {said for said, _ in seen} == {"loaded", "files_changed"}
    assert len({answer[0] for _, answer in seen}) == len({answer for _, answer in seen}) == 2


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
