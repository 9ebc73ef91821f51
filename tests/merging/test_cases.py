"""The tools' own numbers: what their code gives for the fixtures, ours must give too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from make_adapters import FIXTURES
from merging.run_case import SYSTEMS, merge_case, run_case
from safetensors.torch import load_file

from vllm_lora_ext.merging import load_factors, save_peft

CASES = FIXTURES / "merged"
RUNNER = FIXTURES.parent / "merging" / "run_case.py"


def read(folder):
    return json.loads((folder / "case.json").read_text())


NAMES = sorted(
    folder.name
    for folder in CASES.iterdir()
    if (folder / "case.json").exists()
    and (read(folder)["system"] in SYSTEMS or folder.name == "dps_stage")
    and read(folder)["method"] != "extract_svd"
)
LOSSY = [name for name in NAMES if not read(CASES / name)["exact"]]


def expected_deltas(name):
    stored = load_file(CASES / name / "expected.safetensors")
    return {module: stored[module] for module in read(CASES / name)["numerical_rank"]}


def relative_errors(factors, expected):
    """Per module; a missing module counts as zero, one that is not expected must be zero."""
    errors = {}
    for module in set(expected) | set(factors.modules):
        pair = factors.modules.get(module)
        if module not in expected:
            assert pair is None or float(pair.delta().norm()) == 0, module
            continue
        got = torch.zeros_like(expected[module]) if pair is None else pair.delta()
        errors[module] = float((got - expected[module]).norm() / expected[module].norm())
    return errors


def test_no_case_is_lost():
    assert len(NAMES) == 42
    assert len(LOSSY) == 8


@pytest.mark.parametrize("name", NAMES)
def test_saved_adapter_has_the_tool_s_delta(name, tmp_path):
    case = read(CASES / name)
    folder = save_peft(run_case(CASES / name), tmp_path / "out")
    errors = relative_errors(load_factors(folder), expected_deltas(name))
    assert max(errors.values()) <= case["tolerance"], errors


@pytest.mark.parametrize("name", LOSSY)
def test_truncation_is_optimal(name):
    case, expected = read(CASES / name), expected_deltas(name)
    merged = merge_case(CASES / name, case, rank=case["min_rank"])
    for module, error in relative_errors(merged.factors, expected).items():
        sigma = torch.linalg.svdvals(expected[module]).double()
        best = float(sigma[case["min_rank"] :].norm() / sigma.norm())
        assert error <= best * (1 + 1e-4) + case["tolerance"]
        report = merged.report.modules[module]
        assert report.rank == case["min_rank"]
        assert report.kept_energy == pytest.approx(1 - best**2, abs=1e-5)


@pytest.mark.parametrize("name", ["peft_cat_rslora_trap", "sum_rslora"])
def test_rslora_trap_is_repeated_only_on_demand(name):
    merged = merge_case(CASES / name, read(CASES / name))
    assert bool(merged.report.warnings) == name.endswith("trap")


@pytest.mark.parametrize(
    "command", [[sys.executable, str(RUNNER)], [sys.executable, "-m", "tests.merging.run_case"]]
)
def test_runner_is_a_program(command, tmp_path):
    out = tmp_path / "out"
    subprocess.run(
        [*command, str(CASES / "peft_svd_r6"), str(out)], cwd=FIXTURES.parent.parent, check=True
    )
    errors = relative_errors(load_factors(out), expected_deltas("peft_svd_r6"))
    assert max(errors.values()) <= 1e-4
    assert load_factors(out).rank == 6
