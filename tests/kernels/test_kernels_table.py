"""The kernels compile for GPUs that are not there, and kernels/compiled.json lists the variants
that serving reaches."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernels_table.py"


def _script():
    spec = importlib.util.spec_from_file_location("kernels_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


script = _script()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile")
def test_kernels_compile_for_gpus_that_are_not_there():
    """The interpreter takes much that the compiler refuses. Here for one GPU, by
    `make kernels-table` for all."""
    command = [sys.executable, "-P", "-W", "ignore", SCRIPT, "--here", "--gpus", "90"]
    command += ["--ranks", "64", "--dtypes", "bf16"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = [line.split(" | ") for line in run.stdout.splitlines()]
    kernels = {(gpu, kernel) for gpu, kernel, *_ in rows}
    assert kernels == {
        ("sm_90", kernel) for kernel in ("shrink", "expand", "extended", "glu", "mix", "prefetch")
    }
    assert all(registers.split(" / ")[0] != "0" for *_, registers in rows)


@pytest.mark.parametrize("gpu", script.GPUS)
def test_the_table_has_the_variants_that_serving_reaches(gpu):
    names = {variant.name for variant in script.variants(gpu)}
    tables = script.read_numbers()[gpu]
    assert set(tables) == set(script.TRITONS)
    for by_name in tables.values():
        assert set(by_name) == names, "run `make kernels-table`"


@pytest.mark.parametrize("gpu", script.GPUS)
def test_the_numbers_are_of_the_kernels_as_they_are(gpu):
    """Comments and docstrings may change."""
    assert script.read_sources()[gpu] == script.sources(), "run `make kernels-table`"


def test_an_edit_of_a_kernel_makes_another_digest(tmp_path, monkeypatch):
    before = script.sources()
    for folder in ("kernels/gated_lora/backends/triton", "kernels/mix_mlp/backends/triton"):
        shutil.copytree(script.ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    script.sources.cache_clear()
    try:
        assert script.sources() == before
        path = tmp_path / "kernels/mix_mlp/backends/triton/mix.py"
        path.write_text(path.read_text().replace("COLUMNS = 16, 64", "COLUMNS = 16, 32"))
        script.sources.cache_clear()
        assert script.sources() != before
    finally:
        script.sources.cache_clear()


def test_nothing_in_the_table_is_wrong():
    tables = script.read_numbers()
    assert script.page(tables) == script.PAGE.read_text(encoding="utf-8")
    for gpu, table in tables.items():
        for numbers in [n for by_name in table.values() for n in by_name.values()]:
            assert not numbers.wrong and numbers.registers
            assert numbers.shared <= script.GPUS[gpu][2] * 1024
            assert numbers.spilled <= script.MOST_SPILLED


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "NUMBERS", tmp_path / "numbers.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    tables = {"90": {"3.7.1": {"mix | T 16 | bf16 | 4": script.Compiled(10, 0, 4)}, "3.6.0": {}}}
    script.write_numbers(tables, ["90"])
    assert script.read_numbers() == tables
    assert script.read_sources() == {"90": script.sources()}
    assert "| mix | T 16 | bf16 | 4 | 10 / 0 / 4 |  |" in script.PAGE.read_text(encoding="utf-8")


def test_a_variant_that_fails_or_does_not_fit_is_named():
    name, wrong = "mix | T 16 | bf16 | 4", script.Compiled(wrong="does not compile")
    assert "**does not compile**" in script.page({"90": {"3.7.1": {name: wrong}}})
    worse = script.worst(script.Compiled(10, 0, 4), script.Compiled(9, 8, 2, "too large"))
    assert worse == script.Compiled(10, 8, 4, "too large")


def test_a_run_that_was_ended_goes_on_with_the_same_kernels_only(tmp_path):
    kept = tmp_path / "kept.json"
    assert script.read_kept(kept) == {}
    kept.write_text(json.dumps({"sources": script.sources(), "numbers": {"a": [1, 2, 3, ""]}}))
    assert script.read_kept(kept) == {"a": script.Compiled(1, 2, 3)}
    kept.write_text(json.dumps({"sources": "others", "numbers": {"a": [1, 2, 3, ""]}}))
    assert script.read_kept(kept) == {}
