"""concat_routed: one gate over the experts of all adapters, against loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_adapters import (
    BASE_LLAMA,
    normal,
    pick,
    random_adapter,
    random_module,
    random_spec,
    router_spec,
)
from transformers import AutoConfig

from vllm_lora_ext.adapters import RoutedAdapter, RoutedModule, load_adapter, write_native
from vllm_lora_ext.adapters.hf import delta_reference
from vllm_lora_ext.adapters.model import LowRank, MixBlock
from vllm_lora_ext.bundle import Arrow, Expert, bundle
from vllm_lora_ext.convert import differing
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.routed import concat_routed
from vllm_lora_ext.merging.routers import Share
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.routing.mix import mix_reference

NAME = "model.layers.0.mlp.up_proj"


def one(module, system="native", base=""):
    return RoutedAdapter({NAME: module}, system=system, base_model=base)


# The reference: float64, one token at a time, experts as a list of all adapters' experts.


def experts_of(layers):
    """(router row, bias, A [r, in], B [out, r]) of every expert, adapter by adapter."""
    found = []
    for layer in layers:
        at = 0
        for e, rank in enumerate(layer.gate.blocks):
            rows = slice(at, at + rank)
            shared = layer.a_RK.shape[0] != layer.rank
            a = layer.a_RK if shared else layer.a_RK[rows]
            bias = 0.0 if layer.bias_G is None else float(layer.bias_G[e])
            found.append(
                (layer.router_GK[e].double(), bias, a.double(), layer.b_NR[:, rows].double())
            )
            at += rank
    return found


def gate_of(spec, u, bias, head):
    """The weight of every expert from all logits; k and the rest out of `spec`."""
    norm = math.sqrt(sum(v * v for v in u))
    top = max(u)
    exps = [math.exp((v - top) / spec.score_temperature) for v in u]
    score = {
        "identity": u, "abs": [abs(v) for v in u],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in u],
        "l2": [v / norm for v in u], "softmax": [v / sum(exps) for v in exps],
    }[spec.score]  # fmt: skip
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    key = [abs(v) for v in biased] if spec.key == "abs" else biased
    value = biased if spec.bias == "value" else list(score)
    limit = spec.threshold * (1 / (1 + math.exp(-head)) if spec.threshold_head else 1)
    order = sorted(range(len(u)), key=lambda e: -key[e])
    if spec.select == "top_k":
        kept = order[: spec.k]
    elif spec.select == "threshold":
        kept = [e for e in order if key[e] >= limit]
    elif spec.select == "top_p":
        kept = [e for i, e in enumerate(order) if sum(key[j] for j in order[:i]) < spec.top_p]
    else:
        kept = order
    if spec.subtract_threshold:
        value = [v - limit for v in value]
    total = sum(value[e] for e in kept) or 1.0
    powers = {e: math.exp(value[e] / spec.temperature) for e in kept}
    weights = [0.0] * len(u)
    for e in kept:
        weights[e] = {
            "one": 1.0, "score": value[e], "renormalise": value[e] / total,
            "softmax": powers[e] / sum(powers.values()),
        }[spec.weight]  # fmt: skip
        if spec.mask_below is not None and score[e] < spec.mask_below:
            weights[e] = 0.0
    return [spec.constant * w for w in weights]


def reference(layers, x_TK, k):
    """What the union adds to the layer's output."""
    experts, rows = experts_of(layers), []
    spec = layers[0].gate
    if spec.select == "top_k":  # only k is read; the blocks do not matter here
        spec = replace(spec, blocks=(1,) * len(experts), k=k)
    for x in x_TK.double():
        head = 0.0
        if layers[0].head_K is not None:
            head = float(layers[0].head_K.double() @ x) + layers[0].head_bias
        u = [float(row @ x) for row, _, _, _ in experts]
        weights = gate_of(spec, u, [bias for _, bias, _, _ in experts], head)
        rows.append(
            sum(w * (b @ (a @ x)) for w, (_, _, a, b) in zip(weights, experts, strict=True))
        )
    return torch.stack(rows)


def check(layers, made, x_TK, k=0):
    want = reference(layers, x_TK, k or layers[0].gate.k)
    got = delta_reference(made, x_TK).double()
    assert float((got - want).norm() / want.norm().clamp(min=1e-3)) < 2e-5


def some_layers(rng, count, width, out, explicit):
    """Layers whose gates differ in the experts, their ranks and, when `explicit`, k."""
    spec = random_spec(rng, 24, ("router", "prototype"))
    sizes = [spec.num_gates] + [int(rng.integers(1, 8)) for _ in range(count - 1)]
    layers = []
    for size in sizes:
        blocks = tuple(int(rng.integers(1, 5)) for _ in range(size))
        k = 0
        if spec.select == "top_k":
            k = int(rng.integers(1, size + 1)) if explicit else min(spec.k, *sizes)
        layer = random_module(rng, width, out, replace(spec, blocks=blocks, k=k))
        if layers:  # one threshold for all
            layer = replace(layer, head_K=layers[0].head_K, head_bias=layers[0].head_bias)
        layers.append(layer)
    return layers


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), explicit=st.booleans())
def test_one_gate_over_all_experts(seed, explicit):
    rng = np.random.default_rng(seed)
    width, out = int(rng.integers(3, 23)), int(rng.integers(3, 19))
    layers = some_layers(rng, int(rng.integers(2, 4)), width, out, explicit)
    total = sum(layer.gate.num_gates for layer in layers)
    top_k = layers[0].gate.select == "top_k"
    k = int(rng.integers(1, total + 1)) if explicit and top_k else None
    made = concat_routed([one(layer) for layer in layers], k).modules[NAME]
    assert made.gate.num_gates == total
    assert made.gate.blocks == sum((layer.gate.blocks for layer in layers), ())
    assert made.gate.k == (k or layers[0].gate.k)
    check(layers, made, normal(rng, 6, width), k)


@pytest.mark.parametrize("k", range(1, 9))
def test_every_k(k):
    rng = np.random.default_rng(k)
    layers = [random_module(rng, 21, 13, router_spec(e, r, 1)) for e, r in ((3, 2), (5, 3))]
    made = concat_routed([one(layer) for layer in layers], k).modules[NAME]
    check(layers, made, normal(rng, 11, 21), k)


def test_one_softmax_and_not_the_sum():
    rng = np.random.default_rng(0)
    dense = GateSpec(source="router", blocks=(2, 1, 3), score="softmax")
    x = normal(rng, 7, 15)
    first, second = (random_module(rng, 15, 9, dense) for _ in range(2))
    made = concat_routed([one(first), one(second)]).modules[NAME]
    apart = delta_reference(first, x) + delta_reference(second, x)
    assert (delta_reference(made, x) - apart).norm() > 0.2 * apart.norm()
    # Every expert twice at half its weight.
    twice = concat_routed([one(first), one(first)]).modules[NAME]
    torch.testing.assert_close(delta_reference(twice, x), delta_reference(first, x))


def test_three_are_two_and_one():
    rng = np.random.default_rng(3)
    x, y, z = (one(random_module(rng, 9, 7, router_spec(e, 2, 2))) for e in (2, 3, 4))
    assert differing(concat_routed([x, y, z]), concat_routed([concat_routed([x, y]), z])) == []


def test_experts_may_differ_from_layer_to_layer():
    config = AutoConfig.from_pretrained(BASE_LLAMA)

    def spec(rng):
        return router_spec(int(pick(rng, [2, 3, 5])), int(pick(rng, [1, 3])), 2)

    pair = [random_adapter(config, seed, spec, base_model="base_llama") for seed in (1, 2)]
    made = concat_routed(pair)
    counts = {name: m.gate.num_gates for name, m in made.modules.items()}
    assert len(set(counts.values())) > 2
    rng = np.random.default_rng(4)
    for name, module in made.modules.items():
        layers = [adapter.modules[name] for adapter in pair]
        assert counts[name] == sum(layer.gate.num_gates for layer in layers)
        check(layers, module, normal(rng, 3, module.a_RK.shape[1]), 2)


def test_written_and_read_again(tmp_path):
    config = AutoConfig.from_pretrained(BASE_LLAMA)
    pair = [random_adapter(config, seed, router_spec(), targets=["q_proj"]) for seed in (1, 2)]
    made = concat_routed(pair, k=3)
    again = load_adapter(write_native(made, tmp_path))
    assert differing(made, again) == [] and made.system == again.system == "random"


def arrow_experts(rng, names):
    def part(rank):
        return Share(normal(rng, rank, 17), normal(rng, 11, rank), float(rng.uniform(0.3, 3)))

    return [Expert(name, {NAME: part(int(rng.integers(1, 6)))}) for name in names]


@pytest.mark.parametrize("seed", [None, 7])
def test_arrow_of_all_is_arrow_of_the_parts(seed):
    experts = arrow_experts(np.random.default_rng(5), "abcde")
    router = Arrow(k=2, temperature=0.7, seed=seed)
    joined = concat_routed([bundle(experts[:2], router), bundle(experts[2:], router)])
    assert differing(joined, bundle(experts, router)) == []


def shared(rng, a_RK, experts, spec=None):
    """HydraLoRA's layer: all experts with one A."""
    rank, width = a_RK.shape
    spec = spec or GateSpec(source="router", blocks=(rank,) * experts, score="softmax")
    return RoutedModule(a_RK, normal(rng, 8, rank * experts), spec, normal(rng, experts, width))


def test_experts_that_share_one_a():
    rng = np.random.default_rng(6)
    a, other, x = normal(rng, 3, 10), normal(rng, 2, 10), normal(rng, 5, 10)
    same = [shared(rng, a, 2), shared(rng, a.clone(), 3), shared(rng, a.clone(), 1)]
    made = concat_routed([one(layer) for layer in same]).modules[NAME]
    assert made.a_RK.shape == (3, 10) and made.rank == 18
    check(same, made, x)
    mixed = [shared(rng, a, 2), shared(rng, other, 4), shared(rng, a, 1)]
    made = concat_routed([one(layer) for layer in mixed]).modules[NAME]
    assert made.a_RK.shape == (3 * 2 + 2 * 4 + 3, 10)
    check(mixed, made, x)


# MLP blocks


def random_block(rng, ranks, k=2, parts=("gate_proj", "up_proj", "down_proj"), act=None):
    sizes = {"gate_proj": (12, 20), "up_proj": (12, 20), "down_proj": (20, 12)}
    spec = replace(router_spec(len(ranks), 1, k), blocks=tuple(ranks))
    low_rank = {
        part: LowRank(normal(rng, sum(ranks), sizes[part][0]) / 4,
                      normal(rng, sizes[part][1], sum(ranks)) / 4)
        for part in parts
    }  # fmt: skip
    return MixBlock(spec, normal(rng, len(ranks), 12), low_rank, act)


def with_block(block):
    return RoutedAdapter({}, "mixlora", blocks={"model.layers.0.mlp": block})


def test_blocks_after_the_non_linearity():
    rng = np.random.default_rng(7)
    blocks = [random_block(rng, (2, 1)), random_block(rng, (3, 1, 2))]
    (made,) = concat_routed([with_block(block) for block in blocks]).blocks.values()
    weights = {"gate_proj": normal(rng, 20, 12), "up_proj": normal(rng, 20, 12),
               "down_proj": normal(rng, 12, 20)}  # fmt: skip
    act, x_TK = torch.nn.functional.silu, normal(rng, 9, 12)
    got = mix_reference(made, x_TK, {n: (lambda h, w=w: h @ w.T) for n, w in weights.items()}, act)
    for x, y in zip(x_TK, got, strict=True):
        logits = torch.cat([block.router_GK @ x for block in blocks])
        top = torch.softmax(logits, 0).topk(2)
        want = torch.zeros(12)
        for value, e in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            block, e = (blocks[0], e) if e < 2 else (blocks[1], e - 2)
            start = sum(block.gate.blocks[:e])
            rows = slice(start, start + block.gate.blocks[e])

            def run(name, h, block=block, rows=rows):
                part = block.parts[name]
                return weights[name] @ h + part.b_NR[:, rows] @ (part.a_RK[rows] @ h)

            want += value * run("down_proj", act(run("gate_proj", x)) * run("up_proj", x))
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)


# Refusals


def two(first, second=None):
    return [one(first), one(second or first)]


def layer(seed=0, spec=None, width=10, out=8):
    return random_module(np.random.default_rng(seed), width, out, spec or router_spec(3, 2, 2))


SPEC = router_spec(3, 2, 2)
HEAD = GateSpec(
    source="router", blocks=(2, 2), score="softmax", select="threshold", threshold=0.3,
    threshold_head=True,
)  # fmt: skip
OTHER_NAME = RoutedAdapter({"model.layers.1.mlp.up_proj": layer()}, "native")
BLOCK = random_block(np.random.default_rng(1), (1, 2))
REFUSALS = {
    "alone": ([one(layer())], None, "bad_value"),
    "score": (two(layer(), layer(1, replace(SPEC, score="sigmoid"))), None, "setting_mismatch"),
    "weight": (two(layer(), layer(1, replace(SPEC, weight="score"))), None, "setting_mismatch"),
    "k": (two(layer(), layer(1, replace(SPEC, k=1))), None, "setting_mismatch"),
    "select": (two(layer(), layer(1, replace(SPEC, select="all", k=0))), 2, "setting_mismatch"),
    "constant": (two(layer(), layer(1, replace(SPEC, constant=2.0))), None, "setting_mismatch"),
    "source": (two(layer(), layer(1, replace(SPEC, source="prototype"))), None, "setting_mismatch"),
    "k_without_top_k": (two(layer(1, replace(SPEC, select="all", k=0))), 2, "bad_value"),
    "k_too_large": (two(layer()), 7, "k_too_large"),
    "k_zero": (two(layer()), 0, "bad_gate"),
    "no_gate": (two(layer(), layer(1, GateSpec())), None, "unsupported_feature"),
    "both_no_gate": (two(layer(1, GateSpec())), None, "unsupported_feature"),
    "self": (two(layer(1, GateSpec(source="self", blocks=(1,) * 4))), None, "unsupported_feature"),
    "heads": (two(layer(1, HEAD), layer(2, HEAD)), None, "unsupported_feature"),
    "width": (two(layer(), layer(1, width=11)), None, "shape_mismatch"),
    "out": (two(layer(), layer(1, out=9)), None, "shape_mismatch"),
    "lost_layer": ([one(layer()), OTHER_NAME], None, "missing_tensor"),
    "base": ([one(layer(), base="org/a"), one(layer(), base="org/b")], None, "setting_mismatch"),
    "blocks_and_layers": ([one(layer()), with_block(BLOCK)], None, "missing_tensor"),
    "block_k": (
        [with_block(BLOCK), with_block(random_block(np.random.default_rng(2), (1, 2), k=1))],
        None, "setting_mismatch",
    ),
    "block_parts": (
        [with_block(BLOCK), with_block(random_block(np.random.default_rng(2), (1, 2),
                                                    parts=("up_proj",)))],
        None, "setting_mismatch",
    ),
    "block_act": ([with_block(BLOCK), with_block(replace(BLOCK, act="relu"))], None,
                  "setting_mismatch"),
    "no_router": ([one(layer()), one(replace(layer(), router_GK=None))], None, "missing_tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_anything_else_is_refused_with_the_reason(case):
    adapters, k, code = REFUSALS[case]
    with pytest.raises(AdapterError) as caught:
        concat_routed(adapters, k)
    assert caught.value.code == code


def test_the_same_head_and_a_local_copy_of_the_base_are_fine():
    pair = [one(layer(1, HEAD), base="org/model"), one(layer(1, HEAD), base="/models/model/")]
    made = concat_routed(pair)
    assert made.base_model == "org/model"
    check(
        [p.modules[NAME] for p in pair], made.modules[NAME], normal(np.random.default_rng(), 4, 10)
    )


def test_a_refusal_names_the_field_and_both_values():
    with pytest.raises(AdapterError, match=r"differ in 'k'; seen: 1; allowed: 2; fix: give k"):
        concat_routed(two(layer(), layer(1, replace(SPEC, k=1))))
    assert concat_routed(two(layer(), layer(1, replace(SPEC, k=1))), k=2).modules[NAME].gate.k == 2


def test_names_of_systems():
    assert concat_routed(two(layer())).system == "native"
    assert concat_routed([one(layer(), "mola"), one(layer(), "meteora")]).system == "concat"
