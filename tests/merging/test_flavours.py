"""What a flavour takes from its tool beside the formula: defaults, scales, who is counted."""

from __future__ import annotations

import fcntl
import math
import os

import pytest
import torch
from merging.random_factors import SHAPES, deltas, random_factors, random_pair, relative

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, merge, save_peft
from vllm_lora_ext.merging.ops.elect import Election, Voters, merge_entries
from vllm_lora_ext.merging.ops.spaces import core, knots
from vllm_lora_ext.merging.recipes import parse_recipe, run_recipe

Q0, Q1, DOWN = SHAPES


def only(factors, *modules):
    return Factors({name: factors.modules[name] for name in modules}, "tiny")


def dense(term):
    return {name: pair.delta() for name, pair in term.factors.modules.items()}


def test_mergekit_has_defaults_of_its_own():
    terms = [Term(random_factors(1), 0.8), Term(random_factors(2), 0.5)]
    left_out = merge("ties", terms, {"compat": "mergekit"})
    said = merge("ties", terms, {"compat": "mergekit", "density": 1.0})
    assert relative(deltas(left_out.factors), deltas(said.factors)) == 0
    assert merge("ties", terms).report.parameters["density"] == 0.2
    della = merge("della", terms, {"compat": "mergekit"}).report.parameters
    assert (della["density"], della["epsilon"]) == (1.0, 0.15)


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "della_linear"])
def test_without_an_election_absent_adapters_count_in_the_sum_of_weights(method):
    terms = [Term(random_factors(1), 0.5), Term(only(random_factors(2), Q0), 1.5)]
    parameters = {"compat": "mergekit", "density": 1.0, "normalize": True}
    got = deltas(merge(method, terms, parameters).factors)
    first, second = dense(terms[0]), dense(terms[1])
    wanted = {name: 0.25 * delta for name, delta in first.items()}
    wanted[Q0] = wanted[Q0] + 0.75 * second[Q0]
    assert relative(got, wanted) < 1e-5


def test_weights_that_cancel_are_not_normalised_by_mergekit():
    terms = [Term(random_factors(1), 0.5), Term(random_factors(2), -0.5)]
    parameters = {"density": 1.0, "normalize": True}
    got = merge("dare_linear", terms, {**parameters, "compat": "mergekit"})
    plain = merge("cat", terms)
    assert relative(deltas(got.factors), deltas(plain.factors)) < 1e-5
    with pytest.raises(AdapterError) as error:
        merge("dare_linear", terms, parameters)
    assert error.value.code == "bad_value"


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_lorax_takes_the_first_scale_where_the_first_lacks_the_module(method):
    first = Factors(only(random_factors(1), Q0).modules, "tiny", scales={Q0: 0.5}, config_scale=0.5)
    pair = random_pair(9, *SHAPES[DOWN])
    second = Factors({DOWN: Pair(pair.a_RK, 4 * pair.b_NR)}, "tiny", scales={DOWN: 4.0})
    terms = [Term(first, 1.0, "a"), Term(second, -0.7, "b")]
    parameters = {"compat": "lorax"} | ({"density": 1.0} if method == "ties" else {})
    got = merge(method, terms, parameters).factors.modules[DOWN].delta()
    # The weight on both sides, its sign gone.
    assert relative({DOWN: got}, {DOWN: 0.5 * 0.49 * pair.delta()}) < 1e-5


def test_a_folder_says_the_scale_and_rank_of_its_config(tmp_path):
    save_peft(random_factors(1, 3), tmp_path / "a")
    config = (tmp_path / "a/adapter_config.json").read_text()
    text = config.replace('"r": 3', '"r": 9').replace('"lora_alpha": 3', '"lora_alpha": 18')
    text = text.replace('"rank_pattern": {}', '"rank_pattern": {"q_proj": 3, "down_proj": 3}')
    text = text.replace('"use_rslora": false', '"use_rslora": true')
    (tmp_path / "a/adapter_config.json").write_text(text)
    factors = load_factors(tmp_path / "a")
    assert (factors.rank, factors.config_rank, factors.config_scale) == (3, 9, 6.0)
    assert factors.scales[Q0] == pytest.approx(18 / math.sqrt(3))


def test_no_mask_is_stored_of_what_stays_whole():
    terms = [Term(random_factors(1), 1.0, "a", {"density": 1.0}), Term(random_factors(2), 1.0, "b")]
    masks = {
        f"{module}.delta.b": torch.rand(out, width) < 0.5 for module, (width, out) in SHAPES.items()
    }
    merged = merge("dare_linear", terms, {"density": 0.5, "space": "full"}, masks=masks)
    wanted = {
        module: terms[0].factors.modules[module].delta()
        + 2 * terms[1].factors.modules[module].delta() * masks[f"{module}.delta.b"]
        for module in SHAPES
    }
    assert relative(deltas(merged.factors), wanted) < 1e-5


@pytest.mark.parametrize("rate", [0.1, 0.37, 0.9])
def test_mergelm_s_magnitude_strategy_counts_what_is_dropped(rate):
    factors = random_factors(1, shapes={Q0: (13, 17)})
    merged = merge("magnitude_prune", [Term(factors)], {"compat": "mergelm", "density": 1 - rate})
    delta = factors.modules[Q0].delta()
    threshold = delta.abs().flatten().kthvalue(int(delta.numel() * rate)).values
    wanted = delta * (delta.abs() > threshold) / (1 - rate)
    assert relative(deltas(merged.factors), {Q0: wanted}) < 1e-5


def test_svd_clamp_is_peft_s_alone():
    terms = [Term(random_factors(1)), Term(random_factors(2))]
    clamped = merge("svd", terms, {"compat": "peft", "rank": 2, "svd_clamp": 0.9})
    plain = merge("svd", terms, {"compat": "peft", "rank": 2})
    assert 0 < clamped.report.kept_energy < plain.report.kept_energy
    for parameters in ({}, {"compat": "mergekit"}):
        with pytest.raises(AdapterError) as error:
            merge("ties", terms, {**parameters, "svd_clamp": 0.9})
        assert error.value.code == "bad_value"


def test_without_an_election_the_entries_that_are_left_vote():
    tensors = [torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[4.0, 6.0, 0.0]])]
    draws = [lambda rows, t=t: t[rows] for t in tensors]
    got = merge_entries(Voters(draws, [1.0, 1.0]), Election("none", "voters"), 1, 3)
    assert got.tolist() == [[3.0, 6.0, 0.0]]


def test_knots_pieces_begin_with_the_largest_direction():
    pairs = [random_pair(i) for i in range(3)]
    pieces = [draw(slice(None)) for draw in knots(pairs).parts["knots"]]
    length = torch.cat(pieces, dim=1).norm(dim=1)
    assert torch.equal(length, length.sort(descending=True).values)


def test_iso_in_core_space_is_exact_where_singular_values_are_far_apart():
    # Two adapters that nearly cancel: directions of the sum differ by five orders of magnitude.
    near = random_pair(1, 40, 30, 4)
    pairs = [near, Pair(near.a_RK, -near.b_NR * (1 - 1e-5)), random_pair(2, 40, 30, 3)]
    u, s, vt = torch.linalg.svd(sum(p.b_NR.double() @ p.a_RK.double() for p in pairs))
    wanted = (u[:, :7] * s[:7].mean()) @ vt[:7]
    space = core(pairs)
    summed = sum(draw(slice(None)) for draw in space.parts["core"])
    got = space.finish({"core": summed}, iso=True).delta()
    assert relative({Q0: got.double()}, {Q0: wanted}) < 1e-4


def test_a_saved_folder_is_readable_by_others(tmp_path):
    folder = save_peft(random_factors(1), tmp_path / "out")
    assert [oct(p.stat().st_mode & 0o777) for p in sorted(folder.iterdir())] == ["0o644", "0o644"]


def test_what_an_ended_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    ended, living, other = (
        tmp_path / name for name in (".out.part-a", ".out.part-b", ".out.backup")
    )  # fmt: skip
    for folder in (ended, living, other):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    folder = save_peft(random_factors(1), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([living, other, folder])
    os.close(handle)


def test_a_recipe_leaves_a_tool_s_defaults_to_the_tool(tmp_path):
    for i, name in enumerate("ab"):
        save_peft(random_factors(i), tmp_path / name)
    recipe = {
        "version": 1, "merge_method": "ties", "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"compat": "mergekit"},
    }  # fmt: skip
    merged = run_recipe(parse_recipe(recipe), lambda name: tmp_path / name)
    assert merged.report.parameters["density"] == 1.0
