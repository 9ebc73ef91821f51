"""The stored cases: results of the systems' own code, at the tolerance each case states."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CASES = Path(__file__).parents[2] / "fixtures" / "merged"


def load_runner():
    """`tests/merging/run_variant.py`, whose folder is no package."""
    spec = importlib.util.spec_from_file_location(
        "run_variant", Path(__file__).parents[1] / "run_variant.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_variant"] = module
    spec.loader.exec_module(module)
    return module


runner = load_runner()
FOUND = {
    folder.name: case
    for folder in sorted(CASES.iterdir()) if (folder / "case.json").is_file()
    if runner.handles(case := json.loads((folder / "case.json").read_text()))
}  # fmt: skip


def relative(seen, want):
    return float((seen - want).norm() / want.norm())


def test_cases_are_there():
    assert len(FOUND) >= 18


@pytest.mark.parametrize("name", FOUND)
def test_case(name):
    case = FOUND[name]
    run = runner.run_variant(CASES / name, case)
    want = load_file(CASES / name / "expected.safetensors")
    modules = run.converted.factors.modules
    assert set(modules) == set(case["numerical_rank"])
    for module in modules:
        assert relative(modules[module].delta(), want[module]) < case["tolerance"]
    if case["exact"]:
        assert run.converted.factors.rank <= case["rank"]
    if case.get("vector_key"):
        assert relative(run.flat_V, want[case["vector_key"]]) < case["tolerance"]


@pytest.mark.parametrize("name", [n for n, case in FOUND.items() if not case["exact"]])
def test_truncated_case(name):
    case = FOUND[name]
    rank = case["min_rank"]
    converted = runner.run_variant(CASES / name, case, rank=rank).converted
    want = load_file(CASES / name / "expected.safetensors")
    for module, pair in converted.factors.modules.items():
        s = torch.linalg.svdvals(want[module].double())
        best = float(s[rank:].norm() / s.norm())
        assert pair.rank == rank
        assert relative(pair.delta(), want[module]) < best * (1 + case["tolerance"])
        assert converted.error[module] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", [n for n, case in FOUND.items() if case["kind"] == "output"])
def test_output_case(name):
    """With multipliers the layer's output is exact, and they are the tool's own."""
    case = FOUND[name]
    converted = runner.run_variant(CASES / name, case, multipliers=True).converted
    want = load_file(CASES / name / "expected.safetensors")
    base = load_file(CASES / "inputs" / "base" / "model.safetensors")
    for module, pair in converted.factors.modules.items():
        x_TK, weight = want[f"{module}.x"], base[f"{module}.weight"]
        g = (converted.out_scale or {}).get(module)
        g_in = (converted.in_scale or {}).get(module)
        for mine, key in ((g, f"{module}.g"), (g_in, f"{module}.g_in")):
            assert (mine is None) == (key not in want)
            if mine is not None:
                assert relative(mine, want[key]) < case["tolerance"]
        scaled = x_TK if g_in is None else x_TK * g_in
        y = scaled @ weight.T + x_TK @ pair.a_RK.T @ pair.b_NR.T
        assert relative(y if g is None else y * g, want[f"{module}.y"]) < case["tolerance"]


def test_names_of_cases_do_not_matter(tmp_path):
    """Another folder name gives the same result: only system, method and parameters count."""
    for name in ("adalora", "loram_mlp"):
        shutil.copytree(CASES / name, tmp_path / f"x_{name}")
        text = (tmp_path / f"x_{name}" / "case.json").read_text()
        case = json.loads(text.replace(f"{name}/input", f"x_{name}/input"))
        case["case"] = "other"
        (tmp_path / "inputs").mkdir(exist_ok=True)
        if not (tmp_path / "inputs" / "base").exists():
            shutil.copytree(CASES / "inputs" / "base", tmp_path / "inputs" / "base")
        moved = runner.run_variant(tmp_path / f"x_{name}", case).converted.factors
        stays = runner.run_variant(CASES / name, FOUND[name]).converted.factors
        for module, pair in stays.modules.items():
            assert torch.equal(pair.delta(), moved.modules[module].delta())
