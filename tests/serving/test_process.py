"""The merging process: real merges, jobs that take too long, a process that dies."""

from __future__ import annotations

import asyncio
import io
import json
import os
from pathlib import Path

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import load_factors
from vllm_lora_ext.serving import build, process
from vllm_lora_ext.serving.process import Builder

INPUTS = Path(__file__).parent.parent / "fixtures" / "merged" / "inputs"
PRETENDED = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "sleep":
        time.sleep(60)
    if job["do"] == "die":
        os._exit(3)
    print(json.dumps({"pid": os.getpid(), "job": job["do"]}), flush=True)
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    (tmp_path / "pretended_build.py").write_text(PRETENDED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(process, "PROGRAM", "pretended_build")


def test_too_long_dead_and_alive_again(pretended, monkeypatch):
    async def test() -> None:
        builder = Builder(max_seconds=60)
        first = await builder.run({"do": "a"})
        assert await builder.run({"do": "b"}) == {"pid": first["pid"], "job": "b"}
        with monkeypatch.context() as short, pytest.raises(AdapterError) as late:
            short.setattr(builder, "_max_seconds", 0.5)  # a start's time counts too
            await builder.run({"do": "sleep"})
        assert late.value.code == "merge_timeout"
        with pytest.raises(ProcessLookupError):
            os.kill(first["pid"], 0)
        with pytest.raises(AdapterError) as dead:
            await builder.run({"do": "die"})
        assert dead.value.code == "merge_failed"
        assert (await builder.run({"do": "c"}))["job"] == "c"
        await builder.close()

    asyncio.run(test())


def test_a_cancelled_job_s_answer_is_nobody_s(pretended):
    async def test() -> None:
        builder = Builder(max_seconds=30)
        await builder.run({"do": "a"})
        job = asyncio.create_task(builder.run({"do": "sleep"}))
        await asyncio.sleep(0.1)
        job.cancel()
        assert (await builder.run({"do": "b"}))["job"] == "b"
        await builder.close()

    asyncio.run(test())


def test_merges(tmp_path):
    async def test() -> None:
        builder = Builder(max_seconds=100)
        models = [{"model": "math", "parameters": {"weight": 0.6}},
                  {"model": "code", "parameters": {"weight": 0.4}}]  # fmt: skip
        job = {
            "recipe": {"version": 1, "merge_method": "cat", "models": models, "parameters": {}},
            "folders": {name: str(INPUTS / name) for name in ("math", "code")}, "versions": {},
            "lease": str(tmp_path / "lease"), "store": str(tmp_path / "store"),
            "max_bytes": 1 << 26, "dtype": "float32", "max_rank": 64,
        }  # fmt: skip
        assert await builder.run(job) == {"path": job["lease"], "rank": 12}
        math, code = (load_factors(INPUTS / name).modules for name in ("math", "code"))
        for name, pair in load_factors(job["lease"]).modules.items():
            want = 0.6 * math[name].delta()
            if name in code:
                want = want + 0.4 * code[name].delta()
            assert (pair.delta() - want).abs().max() < 1e-5
        again = await builder.run({**job, "lease": str(tmp_path / "lease2")})
        assert again["rank"] == 12  # out of the store
        with pytest.raises(AdapterError) as caught:
            await builder.run({**job, "lease": str(tmp_path / "no"), "max_rank": 11})
        assert caught.value.code == "rank_too_large"
        assert not (tmp_path / "no").exists()
        await builder.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    "error",
    [AdapterError("output_failed", "/data/x cannot be written"), OSError(28, "no", "/data")],
)
def test_a_full_disk_is_the_server_s_fault(monkeypatch, capsys, error):
    """`output_failed` would be answered with 400; a merge that cannot be written is a 500, and
    where it should have stood is for the log."""

    def full(job):
        raise error

    monkeypatch.setattr(build, "run", full)
    said = AdapterError.parse(build._answer("{}")["error"])
    assert said.code == "merge_failed" and "/data" not in str(said)
    assert "/data" in capsys.readouterr().err


def test_a_reader_s_error_names_no_folder_of_the_server(monkeypatch):
    """Its inputs' names became folders on their way to it."""

    def lacking(job):
        raise AdapterError("not_found", "there is no checkpoint", seen=job["folders"]["base"])

    monkeypatch.setattr(build, "run", lacking)
    said = AdapterError.parse(build._answer('{"folders": {"base": "/data/models/base"}}')["error"])
    assert said.code == "not_found" and said.text == "there is no checkpoint; seen: <path>."


@pytest.mark.parametrize("line", ["no JSON", "", "[1]", '{"folders": '])
def test_a_line_that_is_no_job_does_not_end_the_process(line, capsys):
    answers = io.StringIO()
    build.main(io.StringIO(f"{line}\n" * 2), answers)
    for answer in map(json.loads, answers.getvalue().splitlines()):
        assert AdapterError.parse(answer["error"]).code == "merge_failed"
    assert answers.getvalue().count("\n") == 2 and "Traceback" in capsys.readouterr().err


def test_a_machine_that_starts_no_process_is_a_typed_error(monkeypatch):
    async def full(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", full)
    with pytest.raises(AdapterError) as refused:
        asyncio.run(Builder(5).run({}))
    assert refused.value.code == "merge_failed"
