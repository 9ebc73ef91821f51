"""Whatever the parameters of a case are, it is merged or refused by name."""

from __future__ import annotations

import copy
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_adapters import FIXTURES
from merging.case_parameters import TOOLS, VARIANTS
from merging.random_factors import random_factors
from merging.run_case import adapter_of
from merging.run_variant import handles

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import save_peft

CASES = FIXTURES / "merged"
PROFILE = settings(
    max_examples=int(os.environ.get("LORA_EXT_FUZZ", "100")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
ODD = (
    None, True, False, 0, 1, -1, 2, 3, 101, 0.5, -0.5, 1e-300, 1e300, -1e300, 2**70, 10**400,
    float("nan"), float("inf"), "", "x", "1", "none", "ties", [], [None], [0.5], [1, -1], [[1]],
    ["x"], {}, {"a": 1}, {"weight": []}, [{}], [{"density": "x"}, {"density": None}],
)  # fmt: skip
GOOD = {
    "PEFT": {"density": 0.5}, "mergekit": {}, "LoRAX": {"density": 0.5}, "LoraHub": {},
    "Core Space": {"merge_space": "core", "scaling_coeff": 1.0},
    "KnOTS": {"scaling_coeffs": [0.5]},
    "TIES-Merging": {"reset_thresh_percent": 20, "merge_func": "dis-mean", "scaling_lambda": 1.0},
    "DARE": {"mask_rate": 0.5, "use_rescale": True, "scaling_coefficient": 1.0},
    "RobustMerge": {}, "LoRA-Soups": {"lora_mix_mode": "cat"},
}  # fmt: skip


def merges():
    """(tool, its parameter that names the method or None, the methods)."""
    for system, tool in TOOLS.items():
        named = tool.values.get(tool.key)
        yield system, tool, named.allowed if named else sorted(tool.reads)


MERGES = [(system, tool, method) for system, tool, names in merges() for method in names]
CONVERSIONS = {
    path.parent.name: case for path in sorted(CASES.glob("*/case.json"))
    if handles(case := json.loads(path.read_text()))
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("odd")
    for seed, name in enumerate("ab"):
        save_peft(random_factors(seed, 3), home / name)
    return home


def outcome(case_dir, case):
    try:
        adapter_of(case_dir, case)
    except AdapterError as error:
        return error.code
    return None


def names_of(tool, method):
    reads = tool.reads.get(method, tool.reads.get("*", ""))
    here = {*reads.split(), *tool.accepts.split(), *tool.needs.split(), *tool.values}
    return sorted({*here, "weights"})


def merge_case(system, tool, method, **parameters):
    named = {} if tool.key is None else {tool.key: method}
    inputs = [{"adapter": name, "name": name, "weight": 1.0} for name in "ab"]
    return {"system": system, "method": "", "inputs": inputs, "exact": True, "rank": 4,
            "parameters": {**GOOD[system], **named, **parameters}}  # fmt: skip


@pytest.mark.parametrize(("system", "tool", "method"), MERGES)
def test_every_method_of_every_tool_is_merged(home, system, tool, method):
    soups = "missing_tensor" if system == "LoRA-Soups" else None  # learned weights are not here
    case = merge_case(system, tool, method)
    if soups:
        case["inputs"] = [{**entry, "weight": "learned"} for entry in case["inputs"]]
    assert outcome(home / "case", case) == soups


@PROFILE
@given(st.data())
def test_a_merge_of_odd_parameters(home, data):
    system, tool, method = data.draw(st.sampled_from(MERGES))
    names = data.draw(st.lists(st.sampled_from(names_of(tool, method)), min_size=1, max_size=2))
    odd = {name: copy.deepcopy(data.draw(st.sampled_from(ODD))) for name in names}
    outcome(home / "case", merge_case(system, tool, method, **odd))


@PROFILE
@given(st.data())
def test_a_conversion_of_odd_parameters(data):
    name = data.draw(st.sampled_from(sorted(CONVERSIONS)))
    case = copy.deepcopy(CONVERSIONS[name])
    row = "rebase_" if case["method"].startswith("rebase_") else case["method"]
    names = {*case["parameters"], *VARIANTS.get(row, "").split()}
    for key in data.draw(st.lists(st.sampled_from(sorted(names or {"r"})), min_size=1, max_size=2)):
        case["parameters"][key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    outcome(CASES / name, case)


@PROFILE
@given(st.sampled_from(["system", "method", "inputs", "parameters"]), st.sampled_from(ODD))
def test_a_case_of_odd_parts(home, key, value):
    case = merge_case("KnOTS", TOOLS["KnOTS"], "ties")
    outcome(home / "case", {**case, key: value})
    outcome(home / "case", {k: v for k, v in case.items() if k != key})
    inputs = [dict(entry) for entry in case["inputs"]]
    inputs[0] = {**inputs[0], "weight": value, "name": value}
    outcome(home / "case", {**case, "inputs": inputs})
