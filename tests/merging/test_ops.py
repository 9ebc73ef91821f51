"""Operations against their definitions on dense matrices: odd shapes, rank 0 and 1, negatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merging.random_factors import random_pair

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Pair
from vllm_lora_ext.merging.ops import bases, spaces
from vllm_lora_ext.merging.ops.concat import concat
from vllm_lora_ext.merging.ops.elect import Election, Voters, merge_entries
from vllm_lora_ext.merging.ops.factor_linear import factor_linear
from vllm_lora_ext.merging.ops.kmeans import kmeans
from vllm_lora_ext.merging.ops.normalise import balance, normalise
from vllm_lora_ext.merging.ops.scale import count_layers, fits, layer_of, resolve, scale
from vllm_lora_ext.merging.ops.seeds import generator
from vllm_lora_ext.merging.ops.select import in_layers, select_ranks
from vllm_lora_ext.merging.ops.sparsify import SMALL, Sparsity, kth_magnitudes, sparsify
from vllm_lora_ext.merging.ops.truncate import factorise, truncate
from vllm_lora_ext.merging.soups.softmax import softmax_weights

SIZES = st.tuples(st.integers(1, 19), st.integers(1, 23))
SEEDS = st.integers(0, 1000)


def close(got, wanted, tolerance=1e-5):
    return float((got - wanted).norm()) <= tolerance * max(float(wanted.norm()), 1e-6)


def draws_of(tensors):
    return [lambda rows, t=t: t[rows] for t in tensors]


@settings(max_examples=30)
@given(SIZES, st.lists(st.integers(0, 5), min_size=1, max_size=4), SEEDS)
def test_concat_is_the_sum_of_scaled_products(size, ranks, seed):
    pairs = [random_pair(seed + i, *size, rank) for i, rank in enumerate(ranks)]
    weights = [0.7 - i for i in range(len(pairs))]
    got = concat([scale(pair, w) for pair, w in zip(pairs, weights, strict=True)])
    wanted = sum(w * pair.delta() for pair, w in zip(pairs, weights, strict=True))
    assert got.rank == sum(ranks) and close(got.delta(), wanted)


def test_weight_zero_leaves_rank_zero():
    assert scale(random_pair(0), 0.0).rank == 0


@settings(max_examples=40)
@given(SIZES, st.integers(0, 30), st.integers(1, 12), SEEDS)
def test_truncate_is_the_best_approximation(size, rank, wanted_rank, seed):
    pair = random_pair(seed, *size, rank)
    kept = truncate(pair, wanted_rank)
    dense = pair.delta()
    sigma = torch.linalg.svdvals(dense.double())
    rest = float(sigma[wanted_rank:].norm())
    assert kept.pair.rank <= min(max(rank, 0), wanted_rank)
    assert (
        abs(float((kept.pair.delta() - dense).norm()) - rest) <= 2e-5 * float(sigma.norm()) + 1e-6
    )
    if rank > wanted_rank:
        share = float(sigma[:wanted_rank].square().sum() / sigma.square().sum())
        assert kept.energy == pytest.approx(share, abs=1e-5)


@settings(max_examples=30)
@given(st.floats(0.05, 1.0), SEEDS)
def test_truncate_to_energy_takes_the_smallest_rank(energy, seed):
    pair = random_pair(seed, 21, 15, 9)
    kept = truncate(pair, energy=energy)
    share = torch.linalg.svdvals(pair.delta()).double().square()
    share = share.cumsum(0) / share.sum()
    assert kept.energy >= energy - 1e-5
    assert kept.pair.rank == 1 or float(share[kept.pair.rank - 2]) < energy + 1e-5


def test_truncate_of_a_zero_delta_and_of_rank_deficient_pairs():
    assert truncate(Pair(torch.zeros(4, 7), torch.zeros(5, 4)), 2).pair.rank == 0
    pair = random_pair(1, 7, 5, 2)
    assert truncate(concat([pair, scale(pair, -1.0)]), energy=1.0).energy == 1.0
    assert close(truncate(concat([pair, pair]), 2).pair.delta(), 2 * pair.delta())


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_factorise_without_rank_is_exact(shape):
    dense = torch.randn(shape, generator=generator(0))
    kept = factorise(dense, None, None)
    assert torch.equal(kept.pair.delta(), dense) and kept.pair.rank == min(shape)


def test_factorise_large_is_near_the_best():
    draw = generator(0, "large")
    decay = torch.linspace(1, 0.01, 1100)
    dense = (torch.randn(1100, 1100, generator=draw) * decay) @ torch.randn(
        1100, 1100, generator=draw
    )
    kept = factorise(dense, 16, None)
    sigma = torch.linalg.svdvals(dense).double()
    best = float(sigma[16:].norm())
    assert float((kept.pair.delta() - dense).norm()) <= best * (1 + 1e-4)
    assert kept.energy == pytest.approx(1 - (best / float(sigma.norm())) ** 2, abs=1e-4)
    with pytest.raises(AdapterError) as error:
        factorise(dense, None, None)
    assert error.value.code == "missing_key"


def test_factor_linear_modes():
    a, b = random_pair(1), random_pair(2)
    dense = factor_linear([a, b], [0.5, -2.0], "raw").delta()
    assert close(dense, (0.5 * a.b_NR - 2 * b.b_NR) @ (0.5 * a.a_RK - 2 * b.a_RK))
    dense = factor_linear([a, b], [0.5, -2.0], "b_only").delta()
    assert close(dense, (0.5 * a.b_NR - 2 * b.b_NR) @ (a.a_RK + b.a_RK))
    dense = factor_linear([a, b], [0.25, -4.0], "peft").delta()
    assert close(dense, (0.5 * a.b_NR + 2 * b.b_NR) @ (0.5 * a.a_RK - 2 * b.a_RK))
    assert close(factor_linear([a], [-0.3], "peft").delta(), -0.3 * a.delta())


@settings(max_examples=25)
@given(SIZES, st.lists(st.integers(1, 6), min_size=1, max_size=3), SEEDS)
def test_spaces_lose_nothing(size, ranks, seed):
    pairs = [random_pair(seed + i, *size, rank) for i, rank in enumerate(ranks)]
    wanted = sum(pair.delta() for pair in pairs)
    for name in ("core", "knots", "knots_v", "full"):
        space = spaces.SPACES[name](pairs, "m")
        total = {part: sum(d(slice(None)) for d in draws) for part, draws in space.parts.items()}
        back = space.back(total)
        dense = back if isinstance(back, torch.Tensor) else back.delta()
        assert close(dense, wanted, 1e-4), name
        if isinstance(back, Pair):
            assert back.rank <= sum(ranks)


def test_factor_space_wants_one_rank():
    with pytest.raises(AdapterError) as error:
        spaces.factor([random_pair(0, rank=2), random_pair(1, rank=3)], "layer")
    assert error.value.code == "rank_mismatch" and "layer" in error.value.text


@settings(max_examples=40)
@given(SIZES, st.floats(0.01, 0.99), st.booleans(), SEEDS)
def test_magnitude_keeps_the_largest(size, density, extra, seed):
    x = torch.randn(size, generator=generator(seed))
    mask = sparsify(x, Sparsity("magnitude", density, extra=extra), torch.Generator)
    count = int(density * x.numel()) + extra
    assert int(mask.keep.sum()) == count and mask.gain == 1.0
    if 0 < count < x.numel():
        assert float(x[mask.keep].abs().min()) >= float(x[~mask.keep].abs().max())


def test_magnitude_of_large_tensors_counts_ties():
    x = torch.arange(2 * SMALL).float().remainder(7).view(2, -1)
    count = int(0.3 * x.numel())
    keep = sparsify(x, Sparsity("magnitude", 0.3), torch.Generator).keep
    assert int(keep.sum()) == count
    assert float(x[keep].min()) >= float(x[~keep].max())


@settings(max_examples=30)
@given(st.lists(SIZES, min_size=1, max_size=4), st.integers(1, 60), SEEDS)
def test_kth_magnitude_over_many_tensors(sizes, count, seed):
    tensors = [torch.randn(s, generator=generator(seed + i)) for i, s in enumerate(sizes)]
    tensors[0][0, 0] = 0.0
    every = torch.cat([t.flatten() for t in tensors]).abs().sort(descending=True).values
    (kth,) = kth_magnitudes(lambda: ({0: t} for t in tensors), [count])
    assert kth == (float(every[count - 1]) if count <= len(every) else 0.0)


def test_kth_magnitudes_are_separate():
    one, two = torch.tensor([1.0, -5.0, 3.0]), torch.tensor([0.5, 2.0])
    assert kth_magnitudes(lambda: iter([{0: one}, {1: two}]), [2, 1]) == [3.0, 2.0]


def test_breadcrumbs_drops_both_ends():
    x = torch.tensor([[5.0, -4.0, 3.0, 2.0, -1.0, 0.5, 0.4, 0.3, 0.2, 0.1]])
    keep = sparsify(x, Sparsity("outliers", 0.5, gamma=0.2), torch.Generator).keep
    assert keep[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]
    keep = sparsify(x, Sparsity("outliers", 0.9, gamma=0.4), torch.Generator).keep
    assert keep[0].nonzero()[:, 0].tolist() == list(range(1, 10))  # fewer outliers go
    keep = sparsify(x, Sparsity("outliers", 0.5, gamma=0.0), torch.Generator).keep
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_random_rescaling_keeps_the_mean_or_the_norm():
    x = torch.randn(60, 70, generator=generator(1))
    mask = sparsify(x, Sparsity("random", 0.3, rescale="density"), lambda: generator(5))
    assert abs(float(mask.keep.float().mean()) - 0.3) < 0.03
    assert mask.gain == pytest.approx(1 / 0.3)
    mask = sparsify(x, Sparsity("random", 0.3, rescale="l1"), lambda: generator(5))
    thin = mask.apply(x, slice(None))
    assert float(thin.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)


def test_della_prefers_large_entries():
    x = torch.randn(400, 50, generator=generator(2))
    how = Sparsity("della", 0.5, epsilon=0.3, rescale="density")
    mask = sparsify(x, how, lambda: generator(7))
    place = x.abs().argsort(dim=1).argsort(dim=1)
    low, high = mask.keep[place < 5].float().mean(), mask.keep[place >= 45].float().mean()
    assert 0.17 < float(low) < 0.27 and 0.73 < float(high) < 0.83
    assert float(mask.gain[place == 0].mean()) == pytest.approx(1 / 0.2)
    assert float(mask.gain[place == 49].mean()) == pytest.approx(1 / 0.8)


def test_given_masks_are_taken_and_checked():
    x, given_mask = torch.ones(2, 3), torch.tensor([[1, 0, 1], [0, 0, 1]])
    mask = sparsify(x, Sparsity("random", 0.5, rescale="density"), torch.Generator, given_mask)
    assert torch.equal(mask.apply(x, slice(None)), 2.0 * given_mask)
    with pytest.raises(AdapterError) as error:
        sparsify(x, Sparsity("random", 0.5), torch.Generator, given_mask.t())
    assert error.value.code == "shape_mismatch"


def naive_election(tensors, weights, how, absent):
    """Entry by entry, in plain Python."""
    merged = torch.zeros_like(tensors[0])
    norms = [float(t.norm()) or 1.0 for t in tensors]
    votes = [
        {"total": t, "frequency": t.sign(), "weighted": w * t, "none": t}.get(
            how.sign, t.sign() * (t / n) ** 2
        )
        for t, w, n in zip(tensors, weights, norms, strict=True)
    ]
    sums = sum(votes)
    if how.sign == "normfrac":
        stacked = torch.stack(votes)
        sums = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    majority = float(sums.sign().sum().sign()) if how.majority else 1.0
    for at in range(merged.numel()):
        values = [(float(t.flatten()[at]), w) for t, w in zip(tensors, weights, strict=True)]
        sign = float(sums.flatten()[at].sign()) or majority
        turned = how.sign == "weighted"
        agreed = [(x, w) for x, w in values if (x * w if turned else x) * sign > 0]
        everybody = how.sign == "none" or how.join == "all"
        voters = [(x, w) for x, w in values if x or how.divide != "voters"]
        voters = voters if everybody else agreed
        products = [x * w for x, w in voters]
        if how.divide == "largest":
            value = max(products, key=abs, default=0.0)
        elif how.divide == "median":
            padded = sorted(products + [0.0] * (len(values) - len(voters) + absent))
            value = padded[(len(padded) - 1) // 2]
        else:
            divisor = {
                "none": 1.0, "voters": len(voters) or 1.0, "adapters": len(values) + absent,
                "weights": sum(w for _, w in voters) or 1.0,
            }[how.divide]  # fmt: skip
            value = sum(products) / divisor
        turn = how.sign != "none" and how.join == "all"
        merged.view(-1)[at] = abs(value) * sign if turn else value
    return merged


@settings(max_examples=200)
@given(
    st.sampled_from(["none", "total", "frequency", "weighted", "normfrac", "normmass"]),
    st.sampled_from(["none", "voters", "weights", "largest", "adapters", "median"]),
    st.booleans(), st.sampled_from(["voters", "all"]), st.integers(0, 2), st.integers(1, 4), SEEDS,
)  # fmt: skip
def test_election_entry_by_entry(sign, divide, majority, join, absent, count, seed):
    draw = generator(seed)
    # Whole numbers, so that sums of exactly zero occur.
    tensors = [torch.randint(-2, 3, (5, 3), generator=draw).float() for _ in range(count)]
    weights = [1.0, -0.5, 2.0, 0.25][:count]
    how = Election(sign, divide, majority, join, absent)
    got = merge_entries(Voters(draws_of(tensors), weights), how, 5, 3)
    assert torch.allclose(got, naive_election(tensors, weights, how, absent), atol=1e-6)


def test_merging_in_blocks_gives_the_same(monkeypatch):
    tensors = [torch.randn(11, 7, generator=generator(i)) for i in range(3)]
    how = Election("total", "voters", majority=True)
    whole = merge_entries(Voters(draws_of(tensors), [1.0, -2.0, 0.5]), how, 11, 7)
    monkeypatch.setattr("vllm_lora_ext.merging.ops.elect.BLOCK", 20)
    assert torch.equal(
        merge_entries(Voters(draws_of(tensors), [1.0, -2.0, 0.5]), how, 11, 7), whole
    )


def test_tsv_has_orthogonal_directions_and_the_top_values():
    parts = [torch.randn(12, 12, generator=generator(i)) for i in range(3)]
    got = torch.linalg.svdvals(bases.tsv(parts))
    tops = torch.cat([torch.linalg.svdvals(p)[:4] for p in parts]).sort(descending=True).values
    assert torch.allclose(got, tops, atol=1e-4)
    lone = parts[0]
    assert close(bases.tsv([lone]), lone)


def test_tsv_leaves_null_directions_out():
    low = random_pair(0, 12, 12, 2).delta()
    got = torch.linalg.svdvals(bases.tsv([low, torch.randn(12, 12, generator=generator(1))]))
    assert int((got > 1e-4).sum()) == 8  # 2 of the first, 12 / 2 of the second


def test_cart_with_everything_kept():
    parts = [torch.randn(9, 6, generator=generator(i)) for i in range(3)]
    mean = sum(parts) / 3
    assert close(bases.cart(parts, 1.0, 1.0), mean + sum(p - mean for p in parts))
    assert close(bases.cart(parts, 0.01, 0.0), mean)


def test_isotropise_has_equal_values_in_the_same_directions():
    pair = random_pair(3, 11, 9, 4)
    got = bases.isotropise(pair)
    sigma = torch.linalg.svdvals(pair.delta())[:4]
    assert torch.allclose(torch.linalg.svdvals(got.delta())[:4], sigma.mean().repeat(4), atol=1e-4)
    assert close(bases.isotropise(pair.delta()), got.delta())


@settings(max_examples=30)
@given(SIZES, st.integers(0, 6), SEEDS)
def test_normalise_keeps_the_delta_and_fixes_the_form(size, rank, seed):
    pair = random_pair(seed, *size, rank)
    c = torch.tensor([-3.0, 0.2, 5.0, -0.1, 1.0, 40.0])[:rank]
    other = Pair(pair.a_RK * c[:, None], pair.b_NR / c)
    for form in ("svd", "balanced"):
        one, two = normalise(pair, form), normalise(other, form)
        assert close(one.delta(), pair.delta(), 1e-4)
        lengths = one.a_RK.norm(dim=1)
        assert torch.allclose(lengths, one.b_NR.norm(dim=0), rtol=1e-4, atol=1e-5)
        assert bool((lengths.diff() <= 1e-5).all())
        if form == "balanced":
            assert torch.allclose(one.a_RK, two.a_RK, rtol=1e-3, atol=1e-4)


def test_balance_drops_empty_ranks():
    pair = Pair(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.ones(3, 2))
    assert balance(pair).rank == 1 and close(balance(pair).delta(), pair.delta())


def test_weights_per_layer_and_filter():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(5)]
    assert count_layers([*names, "lm_head"]) == 5
    assert [resolve([0.0, 1.0, 0.0], n, 5) for n in names] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert resolve([0.2, 0.8], "lm_head", 5) == 0.8
    assert resolve([0.3], names[2], 5) == 0.3
    table = [{"filter": "attn", "value": -1.0}, {"value": [0.0, 4.0]}]
    assert resolve(table, "model.layers.1.self_attn.q_proj", 5) == -1.0
    assert resolve(table, names[1], 5) == 1.0
    assert resolve({names[0]: 0.25}, names[0], 5) == 0.25


@pytest.mark.parametrize(
    ("weight", "code"),
    [
        (float("nan"), "bad_value"), ("0.5", "bad_value"), (True, "bad_value"), ([], "bad_value"),
        ([1.0, None], "bad_value"), ({"other": 1.0}, "missing_key"),
        ([{"filter": "attn", "value": 1.0}], "missing_key"), ([{"filter": "mlp"}], "missing_key"),
        ([{"value": 1.0, "weight": 2.0}], "unknown_key"),
        ([{"filter": 3, "value": 1}], "bad_value"),
    ],
)  # fmt: skip
def test_bad_weights_are_named(weight, code):
    with pytest.raises(AdapterError) as error:
        resolve(weight, "model.layers.0.mlp.up_proj", 2)
    assert error.value.code == code


def test_layers_are_numbers_not_text():
    assert layer_of("model.layers.12.mlp.up_proj") == 12 and layer_of("lm_head") is None
    assert fits("layers.1", "model.layers.1.mlp") and not fits("layers.1", "model.layers.11.mlp")
    assert not fits("1", "model.layers.21.mlp") and fits("*", "x") and fits("up_proj", "a.up_proj")
    assert in_layers("model.layers.1.q", [1], []) and not in_layers("model.layers.11.q", [1], [])
    assert in_layers("lm_head", [1], []) and not in_layers("model.layers.1.q", None, [1])


def test_select_ranks():
    pair = random_pair(0, rank=4)
    got = select_ranks(pair, indices=[2, 0])
    assert torch.equal(got.delta(), pair.b_NR[:, [2, 0]] @ pair.a_RK[[2, 0]])
    lengths = pair.a_RK.norm(dim=1) * pair.b_NR.norm(dim=0)
    best = sorted(lengths.topk(2).indices.tolist())
    assert torch.equal(select_ranks(pair, top=2).a_RK, pair.a_RK[best])
    assert select_ranks(pair, top=9) is pair
    for bad in ([4], [-1], [1, 1]):
        with pytest.raises(AdapterError) as error:
            select_ranks(pair, indices=bad)
        assert error.value.code == "bad_value"


def test_softmax_runs_over_the_adapters_of_a_module():
    tables = softmax_weights([{"q": 1.0, "k": 0.0}, {"q": -1.0}])
    p = torch.softmax(torch.tensor([1.0, -1.0]), dim=0)
    assert tables[0]["q"] == pytest.approx(float(p[0])) and tables[1]["q"] == pytest.approx(p[1])
    assert tables[0]["k"] == 1.0 and "k" not in tables[1]


def test_generators_go_by_name():
    one, two = generator(3, "q", "a"), generator(3, "q", "b")
    first = torch.rand(4, generator=one)
    assert torch.equal(first, torch.rand(4, generator=generator(3, "q", "a")))
    assert not torch.equal(first, torch.rand(4, generator=two))
    assert not torch.equal(first, torch.rand(4, generator=generator(4, "q", "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(3, "qa")))


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 4), st.booleans(), SEEDS)
@example(9, 3, True, 95)  # a point turns its sign without changing its cluster
def test_kmeans_converges_and_counts(points, k, axial, seed):
    k = min(k, points)
    x = torch.randn(points, 3, generator=generator(seed), dtype=torch.float64)
    found = kmeans(x @ x.t(), k, generator(seed), axial=axial)
    turned = x * found.sign_P[:, None]
    inertia = 0.0
    for j in range(found.clusters):
        members = turned[found.label_P == j]
        assert len(members) > 0
        inertia += float((members - members.mean(dim=0)).square().sum())
    assert found.inertia == pytest.approx(inertia, abs=1e-9)
    assert axial or bool((found.sign_P == 1).all())
