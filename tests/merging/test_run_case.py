"""Cases with parameters that no stored case has: the runner knows the tools, not the cases."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from make_adapters import FIXTURES
from merging.random_factors import SHAPES, deltas, random_factors, random_pair, relative
from merging.run_case import recipe_of, run_case
from merging.run_variant import handles
from safetensors.torch import load_file, save_file

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, load_factors, save_peft

Q0, Q1, DOWN = SHAPES


@pytest.fixture
def home(tmp_path):
    """Inputs a and b of rank 3 and c of rank 5, on other modules."""
    for seed, (name, rank) in enumerate((("a", 3), ("b", 3), ("c", 5))):
        save_peft(random_factors(seed, rank), tmp_path / "inputs" / name)
    return tmp_path


def case(home, system, parameters, weights=(1.0, 1.0), names="ab", **more):
    folder = home / "case"
    folder.mkdir(exist_ok=True)
    inputs = [
        {"adapter": f"inputs/{name}", "name": name, "weight": weight}
        for name, weight in zip(names, weights, strict=False)
    ]
    content = {
        "system": system, "method": "", "inputs": inputs, "parameters": parameters, "exact": True,
        "rank": 4, **more,
    }  # fmt: skip
    (folder / "case.json").write_text(json.dumps(content))
    return folder


def inputs(home, *names):
    return [
        {name: pair.delta() for name, pair in load_factors(home / "inputs" / n).modules.items()}
        for n in names
    ]


def mix(home, weights, names="ab"):
    every = inputs(home, *names)
    return {
        m: sum(w * d[m] for w, d in zip(weights, every, strict=True)) for m in every[0]
    }  # fmt: skip


def result(folder):
    return deltas(run_case(folder))


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "ties", "cat"])
def test_peft_with_one_adapter_is_linear(home, kind):
    parameters = {"combination_type": kind, "svd_rank": 2, "density": 0.3}
    folder = case(home, "PEFT", parameters, (-0.7,), "a")
    assert relative(result(folder), mix(home, [-0.7], "a")) < 1e-5


def test_mergekit_s_shared_parameters(home):
    shared = {"density": 0.4, "lambda": 0.5, "normalize": False}
    folder = case(home, "mergekit", {"merge_method": "ties", "parameters": shared})
    said = recipe_of(folder, json.loads((folder / "case.json").read_text()))["parameters"]
    assert said == {**shared, "compat": "mergekit"}


@pytest.mark.parametrize(("kind", "share"), [("tv", 1.0), ("sum", 1.0), ("mean", 0.5)])
@pytest.mark.parametrize("space", ["core", "knots", "full"])
def test_core_space_sums(home, kind, share, space):
    parameters = {"merge_method": kind, "merge_space": space, "scaling_coeff": 0.6}
    folder = case(home, "Core Space", parameters, (0.6, 0.6))
    assert relative(result(folder), mix(home, [0.6 * share] * 2)) < 1e-5


@pytest.mark.parametrize(("merging", "share"), [("sum", 1.0), ("mean", 0.5)])
def test_knots_without_ties(home, merging, share):
    parameters = {"merge_method": "tv", "merging_type": merging, "scaling_coeffs": [0.4, 0.4]}
    folder = case(home, "KnOTS", parameters, (0.4, 0.4))
    assert relative(result(folder), mix(home, [0.4 * share] * 2)) < 1e-5


def ties(home, weights, **parameters):
    given = {"reset_thresh_percent": 99.9, "merge_func": "dis-sum", "scaling_lambda": 0.7}
    return case(home, "TIES-Merging", {**given, **parameters}, weights)


def test_a_coefficient_that_stands_as_weights_too_counts_once(home):
    wanted = result(ties(home, (1.0, 1.0)))
    assert relative(result(ties(home, (0.7, 0.7))), wanted) < 1e-5


def test_ties_without_signs(home):
    folder = ties(home, (1.0, 1.0), resolve_method="none")
    assert relative(result(folder), mix(home, [0.7, 0.7])) < 0.01  # 99.9 percent stay


def refused(folder, field, seen, allowed):
    with pytest.raises(AdapterError) as error:
        run_case(folder)
    assert error.value.code == "bad_value" and field in error.value.message
    assert f"seen: {seen}; allowed: " in error.value.text and allowed in error.value.text


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("merge_func", "dis-median", "dis-mean"), ("resolve_method", "vote", "normmass"),
        ("reset_type", "nf", "topk"), ("reset_thresh_percent", "all", "none"),
    ],
)  # fmt: skip
def test_what_the_runner_does_not_know_is_no_other_merge(home, key, value, allowed):
    refused(ties(home, (1.0, 1.0), **{key: value}), key, value, allowed)


@pytest.mark.parametrize(
    ("system", "parameters", "name"),
    [
        ("KnOTS", {"merge_method": "ties", "scaling_coeffs": [1.0], "dare_p": 0.5}, "dare_p"),
        ("PEFT", {"combination_type": "ties", "dare_pruning_coeffs": 0.5}, "dare_pruning_coeffs"),
        ("mergekit", {"merge_method": "ties", "parameters": {"topK": 3}}, "topK"),
        ("mergekit", {"merge_method": "ties", "models": [{"name": "a", "t": 0.5}, {}]}, "t"),
        ("LoraHub", {"density": 0.5}, "density"),
    ],
)  # fmt: skip
def test_a_parameter_that_the_tool_does_not_have_is_an_error(home, system, parameters, name):
    with pytest.raises(ValueError, match=f"{system}.* has no parameter {name}\\b"):
        run_case(case(home, system, parameters))


# What the authors' configs say, of today and of their first commits.
WRITTEN = {
    "representation": "svd-vector", "sign_resolve_mode": "sum_of_values", "merging_type": "mean",
    "concat_across_output": True, "dare": False, "dare_pruning_coeffs": 0.0,
    "ingredients_path": "pieces.pt", "merge_other_params": False, "s_on_V": True,
    "ptm_usage": "None", "normalize_Vs_per_model": False,
}  # fmt: skip


@pytest.mark.parametrize("method", ["ties", "tv"])
def test_knots_authors_configs_are_taken_as_they_are(home, method):
    given = {"merge_method": method, "scaling_coeffs": 0.4, "topK": 30}
    bare = result(case(home, "KnOTS", given))
    assert relative(result(case(home, "KnOTS", {**given, **WRITTEN})), bare) == 0


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("sign_resolve_mode", "sum_of_signs", "sum_of_values"),
        ("concat_across_output", False, "true"), ("merging_type", "max", "mean"),
        ("merging_type", "unmerged", "mean"), ("representation", "vector", "svd-vector"),
        ("s_on_V", False, "true"), ("merge_other_params", True, "false"), ("s_on_V", 1, "true"),
        ("ptm_usage", "mean", "None"), ("normalize_Vs_per_model", True, "false"),
    ],
)  # fmt: skip
def test_knots_switches_that_are_not_repeated(home, key, value, allowed):
    given = {"merge_method": "ties", "scaling_coeffs": 0.4, "topK": 30, key: value}
    refused(case(home, "KnOTS", given), key, json.dumps(value).strip('"'), allowed)


@pytest.mark.parametrize("dare", [{"dare": False, "dare_pruning_coeffs": 0.9}, {}])
def test_knots_drops_nothing_unless_told(home, dare):
    given = {"merge_method": "ties", "scaling_coeffs": 0.4, "topK": 30, **dare}
    folder = case(home, "KnOTS", given)
    said = recipe_of(folder, json.loads((folder / "case.json").read_text()))["parameters"]
    assert "drop" not in said and said["lambda"] == 0.4


def test_mergelm_by_magnitude(home):
    parameters = {
        "mask_rate": 0.25, "use_rescale": False, "mask_strategy": "magnitude",
        "scaling_coefficient": 2.0,
    }  # fmt: skip
    got = result(case(home, "DARE", parameters, (1.0,), "a"))
    (delta,) = inputs(home, "a")
    for name, whole in delta.items():
        dropped = int((got[name].abs() < 1e-7).sum())
        assert dropped == int(0.25 * whole.numel())


@pytest.mark.parametrize("start", [1.0, 0.4])
def test_a_stage_of_scalezero(home, start):
    """The base's gate begins at 1 whatever the adapters' begin with; a rank holds here, too."""
    pair = random_pair(3)
    state = {
        "m.weight": torch.randn(17, 13), "m.base_weight_scale.logit": torch.tensor(0.0),
        "m.adapters.0.lora_A": pair.a_RK, "m.adapters.0.lora_B": pair.b_NR,
        "m.adapter_scales.0.logit": torch.tensor(0.5),
    }  # fmt: skip
    (home / "case/input").mkdir(parents=True)
    save_file(state, home / "case/input/state.safetensors")
    folder = case(
        home, "LightZero", {"stage": 1, "lora_alpha": 6, "lora_scale_init": start},
        method="dps_stage",
        inputs=[{"state": "case/input/state.safetensors", "name": "c", "weight": -2.0}],
    )  # fmt: skip
    gate = start + 0.2 * torch.tensor(0.5).tanh()
    assert relative(result(folder), {"m": -2 * gate * 6 / 3 * pair.delta()}) < 1e-5
    assert run_case(folder, rank=2).rank == 2


def test_loram_of_the_mlp_alone_may_say_the_heads(home):
    name = "model.layers.0.mlp.up_proj"
    save_peft(Factors({name: random_pair(1)}), home / "case/input/pruned_adapter")
    (home / "case/input/index").mkdir()
    gone = {"model.layers.0.mlp.pruned_idx": torch.tensor([0, 4])}
    save_file(gone, home / "case/input/index/pruned_idx.safetensors")
    parameters = {
        "recovered": ["mlp"], "index": "input/index: numbers", "full_shapes": {name: [19, 13]},
        "head_dim": 4, "num_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    folder = case(
        home, "LoRAM", parameters, method="loram_recover",
        inputs=[{"adapter": "case/input/pruned_adapter", "name": "p", "weight": 1.0}],
    )  # fmt: skip
    wanted = torch.zeros(19, 13)
    wanted[[i for i in range(19) if i not in (0, 4)]] = random_pair(1).delta()
    assert relative(result(folder), {name: wanted}) < 1e-6


def test_a_case_anywhere_from_a_fresh_shell(home):
    folder = case(home, "PEFT", {"combination_type": "cat"}, (0.5, -1.5), "bc")
    root = FIXTURES.parent.parent
    command = [sys.executable, "-m", "tests.merging.run_case", str(folder), str(home / "out")]
    subprocess.run(command, cwd=root, check=True, env={"PATH": "/usr/bin:/bin"})
    assert relative(deltas(load_factors(home / "out")), mix(home, [0.5, -1.5], "bc")) < 1e-5
    assert load_file(home / "out/adapter_model.safetensors")
    assert isinstance(load_factors(home / "out"), Factors)


KNOTS = {"merge_method": "ties", "scaling_coeffs": [0.4], "topK": 30}
CORE = {"merge_method": "ties", "merge_space": "core", "scaling_coeff": 1.0}


@pytest.mark.parametrize(
    ("system", "parameters", "code", "key"),
    [
        ("Core Space", {**CORE, "dare_pruning_coeffs": 0.4}, "unknown_key", "dare_pruning_coeffs"),
        ("Core Space", {**CORE, "merge_method": "tv", "dare_pruning_coeffs": 0.4}, "unknown_key",
         "dare_pruning_coeffs"),
        ("Core Space", {**CORE, "merge_method": "vote"}, "bad_value", "vote"),
        ("Core Space", {**CORE, "scaling_coeff": None}, "missing_key", "scaling_coeff"),
        ("KnOTS", {**KNOTS, "dare": True}, "missing_key", "dare_pruning_coeffs"),
        ("KnOTS", {**KNOTS, "dare_pruning_rate": 0.1}, "unknown_key", "dare_pruning_rate"),
        ("KnOTS", {"merge_method": "ties"}, "missing_key", "scaling_coeffs"),
        ("mergekit", {"merge_method": "ties", "parameters": {"gamma": 0.1}}, "unknown_key",
         "gamma"),
        ("TIES-Merging", {"merge_func": "dis-sum"}, "missing_key", "reset_thresh_percent"),
    ],
)  # fmt: skip
def test_what_a_method_does_not_read_or_lacks_is_a_typed_error(home, system, parameters, code, key):
    with pytest.raises(AdapterError, match=key) as error:
        run_case(case(home, system, parameters))
    assert error.value.code == code


def test_a_whole_number_is_a_coefficient(home):
    one = result(case(home, "KnOTS", {**KNOTS, "scaling_coeffs": 1}))
    assert relative(one, result(case(home, "KnOTS", {**KNOTS, "scaling_coeffs": 1.0}))) == 0


def test_mergekit_s_global_block_stays_with_any_method(home):
    given = {"merge_method": "ties", "parameters": {"int8_mask": True, "normalize": True}}
    assert result(case(home, "mergekit", given))


VARIANTS = sorted(
    path.parent.name for path in (FIXTURES / "merged").glob("*/case.json")
    if handles(json.loads(path.read_text()))
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_conversion_refuses_what_it_does_not_read(name, tmp_path):
    content = json.loads((FIXTURES / "merged" / name / "case.json").read_text())
    content["parameters"]["dare_pruning_coeffs"] = 0.5
    (tmp_path / "case.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="has no parameter dare_pruning_coeffs"):
        run_case(tmp_path)
