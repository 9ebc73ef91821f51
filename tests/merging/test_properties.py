"""What must hold of LoRA-LEGO's rank clustering, for which no reference code is public."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from make_adapters import FIXTURES
from merging.random_factors import deltas, relative, weighted_sum

from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, merge, save_peft
from vllm_lora_ext.merging.ops.lego import Lego, cluster_ranks
from vllm_lora_ext.merging.ops.normalise import balance
from vllm_lora_ext.merging.ops.seeds import generator

INPUTS = {
    name: load_factors(FIXTURES / "merged/inputs" / name)
    for name in ("math", "code", "eq1", "eq2", "eq3", "style", "rp")
}
GAUGES = ["balanced", "raw"]
ALL_RANKS = 100
Q = "model.layers.0.self_attn.q_proj"


def lego(*terms, k=ALL_RANKS, **parameters):
    """Terms are names, factors, or (either, weight)."""
    made = []
    for term in terms:
        factors, weight = term if type(term) is tuple else (term, 1.0)
        made.append(Term(INPUTS[factors] if isinstance(factors, str) else factors, weight))
    return merge("lego", made, {"k": k, **parameters})


def changed(factors, change):
    """Factors with `change(pair, name)` for every module."""
    modules = {name: change(pair, name) for name, pair in factors.modules.items()}
    return dataclasses.replace(factors, modules=modules)


def permuted(pair, name):
    order = torch.randperm(pair.rank, generator=torch.Generator().manual_seed(len(name)))
    return Pair(pair.a_RK[order], pair.b_NR[:, order])


def regauged(pair, name):
    draw = torch.Generator().manual_seed(len(name) + pair.rank)
    c = torch.exp(torch.randn(pair.rank, generator=draw))
    c *= torch.where(torch.rand(pair.rank, generator=draw) < 0.5, -1.0, 1.0)
    return Pair(pair.a_RK * c[:, None], pair.b_NR / c)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    "terms",
    [
        [("math", 0.6), ("code", -0.4)],
        [("style", 0.7), ("eq1", 0.5), ("rp", 1.3)],
        [("eq1", 1.0), ("eq1", 0.5)],
    ],
)
def test_1_all_ranks_give_the_exact_sum(terms, gauge):
    wanted = weighted_sum([(INPUTS[name], weight) for name, weight in terms])
    merged = lego(*terms, gauge=gauge)
    assert relative(deltas(merged.factors), wanted) < 1e-5


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("statistic", ["mean", "rms", "max"])
def test_2_parameter_reweighting_leaves_single_members(gauge, statistic):
    plain = lego("math", "rp", gauge=gauge)
    other = lego("math", "rp", gauge=gauge, parameter_reweighting=statistic)
    assert relative(deltas(other.factors), deltas(plain.factors)) < 1e-5


@pytest.mark.parametrize("k", [1, 3, 8, 11, ALL_RANKS])
def test_3_output_reweighting_is_one_factor_per_module(k):
    off, on = lego("math", "code", k=k), lego("math", "code", k=k, output_reweighting=True)
    for name, pair in on.factors.modules.items():
        factor = on.report.modules[name].notes["output_factor"]
        ranks = [f.modules[name].rank for f in (INPUTS["math"], INPUTS["code"])
                 if name in f.modules]  # fmt: skip
        assert factor == pytest.approx((sum(ranks) / len(ranks) / pair.rank) ** 0.5)
        wanted = {name: factor * off.factors.modules[name].delta()}
        assert relative({name: pair.delta()}, wanted) < 1e-5


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("k", [3, 8, 13])
def test_4_order_of_units_does_not_matter(gauge, k):
    shuffled = changed(INPUTS["eq2"], permuted)
    assert not torch.equal(shuffled.modules[Q].a_RK, INPUTS["eq2"].modules[Q].a_RK)
    one = lego("eq1", "eq2", "eq3", k=k, gauge=gauge, seed=3)
    two = lego("eq1", shuffled, "eq3", k=k, gauge=gauge, seed=3)
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-4


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("init", ["farthest", "kmeans++"])
def test_5_order_of_adapters_does_not_matter(gauge, init):
    one = lego(("math", 0.5), ("code", 0.8), "eq1", k=6, gauge=gauge, init=init)
    two = lego("eq1", ("code", 0.8), ("math", 0.5), k=6, gauge=gauge, init=init)
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-4


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("init", ["farthest", "kmeans++"])
def test_6_duplicates_collapse(gauge, copies, init):
    merged = lego(*["eq1"] * copies, k=8, gauge=gauge, init=init, restarts=20)
    assert relative(deltas(merged.factors), deltas(INPUTS["eq1"])) < 1e-4
    for name, report in merged.report.modules.items():
        assert report.notes["cluster_sizes"] == [copies] * 8
        assert report.notes["inertia"] <= 1e-9 * float(INPUTS["eq1"].modules[name].a_RK.norm())


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_7_near_duplicates_stay_near(gauge, size):
    def noisy(seed):
        draw = torch.Generator().manual_seed(seed)

        def change(pair, name):
            def add(x):
                noise = torch.randn(x.shape, generator=draw)
                return x + size * x.norm() / noise.norm() * noise

            return Pair(add(pair.a_RK), add(pair.b_NR))

        return changed(INPUTS["math"], change)

    merged = lego(*map(noisy, range(4)), k=8, gauge=gauge)
    assert relative(deltas(merged.factors), deltas(INPUTS["math"])) <= 4 * size


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_8_padding_is_dropped(gauge, side):
    def padded(pair, name):
        a = torch.zeros(2, pair.a_RK.shape[1]) if side != "b" else pair.a_RK[:2] + 1
        b = torch.zeros(pair.b_NR.shape[0], 2) if side != "a" else pair.b_NR[:, :2] + 1
        return Pair(torch.cat([a, pair.a_RK]), torch.cat([b, pair.b_NR], dim=1))

    one = lego("math", "code", k=5, gauge=gauge)
    two = lego(changed(INPUTS["math"], padded), "code", k=5, gauge=gauge)
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-6


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("c", [0.03, 7.0])
def test_9_common_scale(gauge, c):
    def scaled(pair, name):
        return Pair(pair.a_RK * c**0.5, pair.b_NR * c**0.5)

    one = lego("eq1", "eq2", k=7, gauge=gauge)
    two = lego(changed(INPUTS["eq1"], scaled), changed(INPUTS["eq2"], scaled), k=7, gauge=gauge)
    wanted = {name: c * delta for name, delta in deltas(one.factors).items()}
    assert relative(deltas(two.factors), wanted) < 1e-5
    for name, report in one.report.modules.items():
        sizes = two.report.modules[name].notes["cluster_sizes"]
        assert report.notes["cluster_sizes"] == sizes


@pytest.mark.parametrize("k", [2, 8, 11])
def test_10_balanced_gauge_ignores_the_gauge(k):
    one = lego("eq1", "eq2", "eq3", k=k)
    two = lego(*(changed(INPUTS[name], regauged) for name in ("eq1", "eq2", "eq3")), k=k)
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-4


def test_11_raw_gauge_depends_on_it_and_says_so():
    flipped = changed(INPUTS["eq1"], lambda pair, name: Pair(-pair.a_RK, -pair.b_NR))
    one, two = (lego("eq1", f, k=8, gauge="raw") for f in ("eq1", flipped))
    assert relative(deltas(two.factors), deltas(one.factors)) > 0.1
    assert all(m.notes["gauge"] == "raw" for m in one.report.modules.values())
    assert all(m.notes["gauge"] == "balanced" for m in lego("eq1").report.modules.values())


def test_12_moving_the_scale_changes_nothing_when_balanced():
    # alpha doubled and B halved: the folded B is the same up to the order of two products.
    moved = changed(INPUTS["eq1"], lambda pair, name: Pair(pair.a_RK * 2, pair.b_NR / 2))
    one, two = (lego(f, "eq2", k=9) for f in ("eq1", moved))
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-4


@pytest.mark.parametrize("gauge", GAUGES)
def test_13_one_adapter(gauge):
    assert relative(deltas(lego("math", k=8, gauge=gauge).factors), deltas(INPUTS["math"])) < 1e-5
    for k in (1, 3, 7):
        for pair in lego("math", k=k, gauge=gauge).factors.modules.values():
            assert int(torch.linalg.matrix_rank(pair.delta())) <= pair.rank <= k


def test_14_a_module_of_one_adapter_is_kept():
    merged = deltas(lego(("math", 0.6), ("code", -1.5), k=8).factors)
    alone = "model.layers.0.mlp.gate_proj"
    assert alone not in INPUTS["code"].modules
    wanted = {alone: 0.6 * INPUTS["math"].modules[alone].delta()}
    assert relative({alone: merged[alone]}, wanted) < 1e-5


@pytest.mark.parametrize("gauge", GAUGES)
def test_15_weight_zero_removes_an_adapter(gauge):
    one = lego("math", "eq1", k=8, gauge=gauge)
    two = lego("math", ("code", 0.0), "eq1", k=8, gauge=gauge)
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-6


@pytest.mark.parametrize("gauge", GAUGES)
def test_16_more_clusters_than_ranks(gauge):
    one, two = (lego("eq1", "code", k=k, gauge=gauge) for k in (12, 5000))
    assert relative(deltas(two.factors), deltas(one.factors)) < 1e-6


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("statistic", ["mean", "rms", "max"])
def test_17_parameter_reweighting_restores_lengths(gauge, statistic):
    pairs = [INPUTS[name].modules[Q] for name in ("eq1", "eq2", "eq3")]
    how = Lego(5, gauge, parameter=statistic)
    off = cluster_ranks(pairs, dataclasses.replace(how, parameter="none"), generator(0, Q))
    on = cluster_ranks(pairs, how, generator(0, Q))
    units = torch.cat([unit_rows(pair, gauge) for pair in pairs])
    centres, stretched = unit_rows(off.pair), unit_rows(on.pair)
    label = nearest(units, centres, gauge)
    for j in range(5):
        members = units[label == j].norm(dim=1)
        wanted = {"mean": members.mean(), "rms": members.square().mean().sqrt(),
                  "max": members.max()}[statistic]  # fmt: skip
        assert float(stretched[j].norm()) == pytest.approx(float(wanted), rel=1e-5)
        assert float(stretched[j].norm()) >= float(centres[j].norm()) * (1 - 1e-6)


def test_18_same_seed_same_bytes(tmp_path):
    files = []
    for i in range(2):
        merged = lego("math", "code", "eq1", k=6, seed=11, init="kmeans++")
        lock = json.dumps(merged.report.to_dict()).encode()
        folder = save_peft(merged.factors, tmp_path / str(i), extra_files={"lock.json": lock})
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    lock = json.loads(files[0]["lock.json"])
    assert (lock["parameters"]["seed"], lock["parameters"]["init"]) == (11, "kmeans++")
    for name, rank in merged.factors.ranks().items():
        members = sum(INPUTS[i].modules[name].rank for i in ("math", "code", "eq1")
                      if name in INPUTS[i].modules)  # fmt: skip
        sizes = lock["modules"][name]["cluster_sizes"]
        assert len(sizes) == rank and sum(sizes) == members


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("k", [2, 5, 17])
@pytest.mark.parametrize("seed", range(3))
def test_19_every_unit_is_nearest_to_its_own_centre(gauge, k, seed):
    pairs = [INPUTS[name].modules[Q] for name in ("math", "eq2", "eq3")]
    found = cluster_ranks(pairs, Lego(k, gauge), generator(seed, Q))
    units = torch.cat([unit_rows(pair, gauge) for pair in pairs]).double()
    centres = unit_rows(found.pair).double()
    label = nearest(units, centres, gauge)
    # Were a unit in another cluster than its nearest, sizes or centres would differ.
    assert torch.bincount(label, minlength=k).tolist() == found.sizes
    inertia = 0.0
    for j in range(k):
        members = units[label == j]
        if gauge == "balanced":
            members = members * (members @ centres[j]).sign()[:, None]
        assert torch.allclose(members.mean(dim=0), centres[j], atol=1e-5)
        inertia += float((members - centres[j]).square().sum())
    assert inertia == pytest.approx(found.inertia, rel=1e-4)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_20_the_result_is_an_ordinary_adapter(k, tmp_path):
    merged = lego("math", ("style", -2.0), "rp", k=k, output_reweighting=True)
    folder = save_peft(merged.factors, tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["lora_alpha"] == config["r"] <= k
    assert config["rank_pattern"] == config["alpha_pattern"]
    back = load_factors(folder)
    assert set(back.scales.values()) == {1.0}
    for pair in back.modules.values():
        assert pair.rank <= k
        assert bool(torch.isfinite(pair.a_RK).all()) and bool(torch.isfinite(pair.b_NR).all())


def test_no_unit_at_all():
    empty = Factors({Q: Pair(torch.zeros(2, 5), torch.ones(4, 2))})
    assert lego(empty, k=2).factors.modules == {}


def unit_rows(pair, gauge="raw"):
    pair = balance(pair) if gauge == "balanced" else pair
    return torch.cat([pair.a_RK, pair.b_NR.t()], dim=1)


def nearest(units, centres, gauge):
    inner = units @ centres.t()
    if gauge == "balanced":
        inner = inner.abs()
    return (centres.square().sum(dim=1) - 2 * inner).argmin(dim=1)
