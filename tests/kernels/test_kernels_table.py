"""The kernels compile for GPUs that are not there, and kernels/COMPILED.md lists the variants that
serving reaches."""

from __future__ import annotations

import importlib.util
import json
import os
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
def test_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    """The interpreter takes much that the compiler refuses."""
    out = tmp_path / "found.json"
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", SCRIPT, "--here", "--ranks", "64", "--dtypes",
         "bf16", "--json", out],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads(out.read_text())
    assert set(found) == set(script.GPUS)
    for by_name in found.values():
        assert {name.split(" | ")[0] for name in by_name} == {"shrink", "expand", "mix"}
        assert all(registers and shared for registers, _, shared, _ in by_name.values())


def test_the_page_lists_the_variants_that_serving_reaches():
    page = script.PAGE.read_text(encoding="utf-8")
    names = {variant.name for variant in script.variants("90")}
    assert set(script.rows_of(page, "90")) == names, "run `make kernels-table`"


def test_nothing_on_the_page_is_wrong():
    page = script.PAGE.read_text(encoding="utf-8")
    for gpu, (_, _, shared) in script.GPUS.items():
        cells = [
            cell.split(" / ")
            for line in page.partition(f"## sm_{gpu} ")[2].partition("\n## ")[0].splitlines()
            if line.startswith("| ") and " / " in line
            for cell in line.strip("| ").split(" | ")[4:]
        ]
        assert len(cells) == len(script.TRITONS) * len(script.rows_of(page, gpu))
        assert all(int(bytes_) <= shared * 1024 for _, _, bytes_ in cells)


def test_a_variant_that_fails_or_does_not_fit_is_named():
    script_ = script
    table = {"90": {"3.7.1": {"mix | T 16 | bf16 | 4": script_.Compiled(wrong="does not compile")}}}
    assert "**does not compile**" in script_.page(table)
    worse = script_.worst(script_.Compiled(10, 0, 4), script_.Compiled(9, 8, 2, "too large"))
    assert worse == script_.Compiled(10, 8, 4, "too large")
