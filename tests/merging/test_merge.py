"""The public face: merge() over every method, its parameters, its report and its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging.random_factors import (
    SHAPES,
    deltas,
    random_factors,
    random_pair,
    relative,
    weighted_sum,
)

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import METHODS, PARAMETERS, Factors, Pair, Term, merge

Q0, Q1, DOWN = SHAPES
# On one dense pair of these shapes every method runs without more parameters.
SAMPLE = {"select_layers": {"include": [0]}, "select_ranks": {"top": 2}}


def terms(*weights, rank=3):
    return [Term(random_factors(i, rank), w) for i, w in enumerate(weights, start=1)]


@pytest.mark.parametrize(
    ("space", "weight", "density"), [("full", 1.0, 1e-300), ("full", 1e38, 1.0), ("core", 1e38, 1)]
)
def test_overflow_before_an_svd_is_refused(space, weight, density):
    """A density that divides by nothing, and a product above fp32's range."""
    terms = [Term(random_factors(seed), weight) for seed in (1, 2)]
    parameters = {"density": density, "space": space, "rank": 2}
    with pytest.raises(AdapterError) as error:
        merge("dare_linear", terms, {**parameters, "lambda": 1e6})
    assert error.value.code == "not_finite"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_reports(name):
    merged = merge(name, terms(0.7, -0.4, 1.2), SAMPLE.get(name))
    assert set(merged.report.modules) == set(SHAPES)
    for module, pair in merged.factors.modules.items():
        width, out = SHAPES[module]
        assert pair.a_RK.shape == (pair.rank, width) and pair.b_NR.shape == (out, pair.rank)
        assert pair.a_RK.dtype == pair.b_NR.dtype == torch.float32
        assert merged.report.modules[module].rank == pair.rank > 0
        assert 0 < merged.report.modules[module].kept_energy <= 1
    assert merged.factors.base_model == "tiny"
    json.dumps(merged.report.to_dict())


@pytest.mark.parametrize("name", METHODS)
def test_report_says_exact_only_when_it_is_the_sum(name):
    given_terms = [Term(random_factors(1, 2), 0.7), Term(random_factors(2, 2), -0.4)]
    merged = merge(name, given_terms, SAMPLE.get(name))
    wanted = weighted_sum([(t.factors, t.weight) for t in given_terms])
    error = relative(deltas(merged.factors), wanted)
    if merged.report.exact and name not in SAMPLE:
        assert error < 1e-5
    if error < 1e-6:
        assert METHODS[name].exact or name == "select_layers"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [1, 4])
def test_rank_and_lambda_hold_for_every_method(name, rank):
    parameters = {**SAMPLE.get(name, {}), "seed": 4} if "seed" in METHODS[name].parameters else {
        **SAMPLE.get(name, {})
    }  # fmt: skip
    # lego clusters to `rank`, which is no cut of the larger result.
    start = {**parameters, "k": 4} if name == "lego" else parameters
    whole = merge(name, terms(1.0, 0.5), start)
    cut = merge(name, terms(1.0, 0.5), {**start, "rank": rank, "lambda": -2.0})
    for module, pair in cut.factors.modules.items():
        dense = whole.factors.modules[module].delta()
        sigma = torch.linalg.svdvals(dense).double()
        assert pair.rank <= rank
        if name == "svd" and rank > 3:
            continue  # its own rank is the smaller one
        error = float((pair.delta() + 2 * dense).norm())
        assert error <= 2 * float(sigma[rank:].norm()) * (1 + 1e-3) + 1e-4 * float(sigma.norm())


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.floats(-2, 2)), min_size=1, max_size=4),
    st.integers(0, 100),
)
def test_cat_is_exact_for_any_ranks_and_weights(ranks_and_weights, seed):
    made = []
    for i, (rank, weight) in enumerate(ranks_and_weights):
        shapes = dict(list(SHAPES.items())[: 1 + (seed + i) % 3])
        made.append(Term(random_factors(seed + i, rank, shapes), weight, name=str(i)))
    merged = merge("cat", made)
    wanted = weighted_sum([(t.factors, t.weight) for t in made])
    assert relative(deltas(merged.factors), wanted) < 1e-4 or all(
        float(d.norm()) < 1e-6 for d in wanted.values()
    )
    for name, report in merged.report.modules.items():
        live = (t for t in made if name in t.factors.modules and t.weight)
        assert report.rank == sum(t.factors.modules[name].rank for t in live)


def test_linear_without_flavour_is_the_sum_of_products():
    made = terms(0.7, -0.4)
    wanted = weighted_sum([(t.factors, t.weight) for t in made])
    assert relative(deltas(merge("linear", made).factors), wanted) < 1e-5
    for flavour in ("peft", "lorax", "lorahub", "soups"):
        merged = merge("linear", made, {"compat": flavour})
        assert relative(deltas(merged.factors), wanted) > 0.1 and not merged.report.exact


def test_ties_is_in_core_space_unless_said():
    made = terms(1.0, 0.5, -1.0)
    core = merge("ties", made, {"density": 0.4})
    said = merge("ties", made, {"density": 0.4, "space": "core"})
    assert relative(deltas(core.factors), deltas(said.factors)) == 0
    assert core.factors.rank <= 9  # the sum of the ranks
    full = merge("ties", made, {"density": 0.4, "space": "full"})
    assert relative(deltas(core.factors), deltas(full.factors)) > 0.1


def test_ties_in_full_space_against_its_definition():
    made = terms(1.0, 0.5, -1.0)
    merged = merge("ties", made, {"density": 0.3, "space": "full", "lambda": 0.5})
    for name in SHAPES:
        thin = []
        for term in made:
            dense = term.factors.modules[name].delta()
            count = int(0.3 * dense.numel())
            kth = dense.abs().flatten().sort(descending=True).values[count - 1]
            thin.append(torch.where(dense.abs() >= kth, dense, 0.0))
        sign = torch.where(sum(thin) >= 0, 1.0, -1.0)
        voted = [x.sign() == sign for x in thin]
        total = sum(t.weight * x * v for t, x, v in zip(made, thin, voted, strict=True))
        wanted = 0.5 * total / sum(v.float() for v in voted).clamp(min=1)
        assert relative({name: merged.factors.modules[name].delta()}, {name: wanted}) < 1e-5


@pytest.mark.parametrize("name", ["ties_original", "knots"])
def test_trimming_over_the_whole_adapter(name):
    """One threshold per adapter over all modules: a module of small entries loses all of them."""
    big = random_factors(1)
    modules = {**big.modules, DOWN: Pair(big.modules[DOWN].a_RK * 1e-3, big.modules[DOWN].b_NR)}
    merged = merge("ties", [Term(Factors(modules))], {"compat": name, "density": 0.05})
    assert float(merged.factors.modules[Q0].delta().norm()) > 0
    left = merged.factors.modules.get(DOWN)
    assert left is None or float(left.delta().norm()) == 0


@pytest.mark.parametrize("name", ["dare_ties", "dare_linear", "della", "della_linear"])
@pytest.mark.parametrize("space", ["core", "factor", "full"])
def test_random_methods_go_by_seed_and_names(name, space):
    one, two = random_factors(1), random_factors(2)
    parameters = {"density": 0.5, "space": space, "seed": 7}
    first = merge(name, [Term(one, 0.3, "a"), Term(two, 0.9, "b")], parameters)
    second = merge(name, [Term(two, 0.9, "b"), Term(one, 0.3, "a")], parameters)
    other = merge(
        name, [Term(one, 0.3, "a"), Term(two, 0.9, "b")], {**parameters, "seed": 8}
    )  # fmt: skip
    if space != "core":  # the order of the adapters turns the core basis by rounding only
        assert relative(deltas(second.factors), deltas(first.factors)) < 1e-6
    assert relative(deltas(other.factors), deltas(first.factors)) > 1e-2
    # A module's draws do not depend on which other modules there are.
    lone = {Q1: one.modules[Q1]}, {Q1: two.modules[Q1]}
    alone = merge(
        name, [Term(Factors(lone[0]), 0.3, "a"), Term(Factors(lone[1]), 0.9, "b")], parameters
    )
    assert relative(deltas(alone.factors), {Q1: first.factors.modules[Q1].delta()}) < 1e-6


def test_own_density_and_masks():
    made = [Term(random_factors(1), 1.0, "a", {"density": 1.0}), Term(random_factors(2), 1.0, "b")]
    masks = {
        f"{module}.delta.{name}": torch.rand(out, width) < 0.5
        for module, (width, out) in SHAPES.items()
        for name in "ab"
    }
    parameters = {"density": 0.5, "space": "full"}
    merged = merge("dare_linear", made, parameters, masks=masks)
    for module in SHAPES:
        d = [t.factors.modules[module].delta() for t in made]
        kept = [masks[f"{module}.delta.{name}"] for name in "ab"]
        wanted = d[0] * kept[0] + d[1] * kept[1] / 0.5
        assert relative({module: merged.factors.modules[module].delta()}, {module: wanted}) < 1e-5
    del masks[f"{Q0}.delta.b"]
    with pytest.raises(AdapterError) as error:
        merge("dare_linear", made, parameters, masks=masks)
    assert error.value.code == "missing_tensor"


def test_weights_by_layer_filter_and_module():
    factors = random_factors(1)
    merged = merge("cat", [Term(factors, [{"filter": "mlp", "value": 5.0}, {"value": [1.0, 3.0]}])])
    wanted = {Q0: 1.0, Q1: 3.0, DOWN: 5.0}
    by_module = merge("cat", [Term(factors, wanted)])
    for got in (merged, by_module):
        scaled = {name: w * factors.modules[name].delta() for name, w in wanted.items()}
        assert relative(deltas(got.factors), scaled) < 1e-6
    deep = merge("cat", [Term(factors, [0.0, 4.0])], {"layers": 5})
    assert relative(deltas(deep.factors), {
        Q1: factors.modules[Q1].delta()}) < 1e-6  # fmt: skip


def test_normalize_divides_by_the_sum_of_all_weights():
    made = terms(0.6, 0.9)
    merged = merge("svd", made, {"normalize": True, "rank": 6})
    wanted = weighted_sum([(made[0].factors, 0.4), (made[1].factors, 0.6)])
    assert relative(deltas(merged.factors), wanted) < 1e-5
    with pytest.raises(AdapterError) as error:
        merge("cat", terms(0.5, -0.5), {"normalize": True})
    assert error.value.code == "bad_value"


def test_svd_keeps_the_largest_rank_or_the_energy():
    made = [Term(random_factors(1, 2)), Term(random_factors(2, 5))]
    assert merge("svd", made).factors.rank == 5
    merged = merge("svd", made, {"energy": 0.8})
    assert 0.8 <= merged.report.kept_energy < 1 and merged.factors.rank < 7
    assert not merged.report.exact


def test_stages_and_layers():
    made = terms(0.5, 1.5, 2.0)
    merged = merge("dps", made, {"stage": 2})
    assert relative(deltas(merged.factors), weighted_sum([(t.factors, t.weight)
                    for t in made[:2]])) < 1e-5  # fmt: skip
    with pytest.raises(AdapterError):
        merge("dps", made, {"stage": 4})
    kept = merge("select_layers", terms(1.0), {"include": [1]})
    assert set(kept.factors.modules) == {Q1} and kept.report.modules[Q0].rank == 0
    kept = merge("select_layers", terms(1.0), {"exclude": [1]})
    assert set(kept.factors.modules) == {Q0, DOWN}


def test_progress_is_told_per_module():
    told = []
    merge("ties", terms(1.0, 1.0), progress=lambda *args: told.append(args))
    assert told == [(i, 3, name) for i, name in enumerate(sorted(SHAPES), start=1)]


def test_other_bases_are_warned_of():
    one, two = random_factors(1), random_factors(2)
    assert merge("cat", [Term(one), Term(two)]).report.warnings == []
    other = Factors(two.modules, "other-model")
    (warning,) = merge("cat", [Term(one), Term(other)]).report.warnings
    assert "other-model" in warning and "tiny" in warning


REFUSED = [
    ("slerp", {}, "bad_value"),
    ("cat", {"density": 0.5}, "unknown_key"),
    ("ties", {"density": 0.0}, "bad_value"),
    ("ties", {"density": "0.2"}, "bad_value"),
    ("ties", {"density": True}, "bad_value"),
    ("ties", {"density": float("nan")}, "bad_value"),
    ("ties", {"compat": "mergelm"}, "bad_value"),
    ("ties", {"normalize": True, "divide": "voters"}, "bad_value"),
    ("ties", {"sign": "total", "majority_sign_method": "total"}, "bad_value"),
    ("svd", {"rank": 0}, "bad_value"),
    ("svd", {"rank": 2.0}, "bad_value"),
    ("svd", {"energy": 1.5}, "bad_value"),
    ("cat", {"lambda": float("inf")}, "bad_value"),
    ("tsv", {"space": "factor"}, "bad_value"),
    ("lego", {"gauge": "svd"}, "bad_value"),
    ("select_ranks", {"indices": [7]}, "bad_value"),
    ("dare_ties", {"seed": -1}, "bad_value"),
    ("iso", {"density": 0.5}, "unknown_key"),
    ("iso", {"isotropise": False}, "unknown_key"),
    ("ties", {"gamma": 0.1}, "unknown_key"),
    ("ties", {"epsilon": 0.1}, "unknown_key"),
    ("magnitude_prune", {"seed": 1}, "unknown_key"),
    ("dare_ties", {"gamma": 0.1}, "unknown_key"),
    ("della", {"gamma": 0.1}, "unknown_key"),
    ("breadcrumbs", {"epsilon": 0.1}, "unknown_key"),
    ("breadcrumbs", {"seed": 1}, "unknown_key"),
    ("linear", {"compat": "peft", "normalize": True}, "bad_value"),
    ("ties", {"compat": "peft", "svd_clamp": 0.9}, "bad_value"),
]


@pytest.mark.parametrize(("method", "parameters", "code"), REFUSED)
def test_bad_parameters_are_refused_by_name(method, parameters, code):
    with pytest.raises(AdapterError) as error:
        merge(method, terms(1.0, 1.0), parameters)
    assert error.value.code == code
    assert method in error.value.text or any(name in error.value.text for name in parameters)


@pytest.mark.parametrize(
    ("method", "own"), [("iso", "density"), ("ties", "gamma"), ("breadcrumbs", "epsilon")]
)
def test_an_adapter_s_own_parameter_that_nothing_reads(method, own):
    with pytest.raises(AdapterError) as error:
        merge(method, [Term(random_factors(1), 1.0, parameters={own: 0.1})])
    assert error.value.code == "unknown_key" and own in error.value.text


def test_unknown_parameter_names_the_allowed_ones():
    with pytest.raises(AdapterError) as error:
        merge("cat", terms(1.0), {"densety": 0.5})
    assert "densety" in error.value.text and "normalize" in error.value.text


def test_inputs_that_do_not_belong_together():
    one = random_factors(1)
    other = Factors({Q0: random_pair(0, 13, 18)})
    for bad, code in (
        ([Term(one), Term(other)], "shape_mismatch"),
        ([], "empty_adapter"),
        ([Term(Factors({}))], "empty_adapter"),
        ([Term(one, float("inf"))], "bad_value"),
        ([Term(one, 1.0, "", {"seed": 1})], "unknown_key"),
        ([Term(one, 1.0, "", {"density": 2.0})], "bad_value"),
    ):
        with pytest.raises(AdapterError) as error:
            merge("ties", bad)
        assert error.value.code == code
    mixed = [Term(random_factors(1, 2)), Term(random_factors(2, 3))]
    for method, parameters in (
        ("ties", {"space": "factor"}), ("linear", {"compat": "peft"}), ("robustmerge", {}),
        ("lorahub", {}), ("soups", {"mode": "linear"}),
    ):  # fmt: skip
        with pytest.raises(AdapterError) as error:
            merge(method, mixed, parameters)
        assert error.value.code == "rank_mismatch"


def test_overflow_is_refused():
    huge = random_factors(1)
    with pytest.raises(AdapterError) as error:
        merge("cat", [Term(huge, 1e30), Term(huge, 1e38)], {"lambda": 1e6})
    assert error.value.code == "not_finite"


@pytest.mark.parametrize("name", METHODS)
def test_rank_zero_inputs(name):
    empty = Factors({module: random_pair(0, *shape, 0) for module, shape in SHAPES.items()})
    merged = merge(name, [Term(empty)], {"include": [0]} if name == "select_layers" else None)
    assert merged.factors.modules == {}
    one = merge(name, [Term(empty, name="e"), Term(random_factors(1), name="a")], SAMPLE.get(name))
    assert one.report.modules[Q0].rank > 0


@pytest.mark.parametrize("name", METHODS)
def test_table_is_complete(name):
    method = METHODS[name]
    assert method.name == name and method.url.startswith("https://") and method.why
    assert set(method.parameters) <= set(PARAMETERS)
    assert set(method.only) <= set(method.parameters)


def test_commuting_methods_do_not_depend_on_the_order():
    for name, method in METHODS.items():
        if not method.commutes:
            continue
        made = [Term(random_factors(i), 0.4 * i, f"a{i}") for i in (1, 2, 3)]
        parameters = SAMPLE.get(name)
        one, two = merge(name, made, parameters), merge(name, made[::-1], parameters)
        assert relative(deltas(two.factors), deltas(one.factors)) < 2e-4, name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("iso", "density"), ("iso", "seed"), ("ties", "gamma"), ("ties", "epsilon"),
        ("breadcrumbs", "epsilon"), ("breadcrumbs", "seed"), ("dare_linear", "gamma"),
        ("magnitude_prune", "epsilon"), ("magnitude_prune", "seed"), ("della", "gamma"),
    ],
)  # fmt: skip
def test_a_method_accepts_only_what_it_reads(name, key):
    with pytest.raises(AdapterError) as error:
        merge(name, [Term(random_factors(1, 2))], {key: 1})
    assert error.value.code == "unknown_key" and f"'{key}'" in error.value.text
