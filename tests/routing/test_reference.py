"""gate_reference against a second implementation: plain Python floats, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from make_adapters import random_spec

from vllm_lora_ext.routing import GateSpec, gate_reference

NEAR = 1e-4  # a decision nearer than this may fall either way in fp32


def scores_of(spec, u):
    match spec.score:
        case "softmax":
            powers = [math.exp((v - max(u)) / spec.score_temperature) for v in u]
            return [p / sum(powers) for p in powers]
        case "sigmoid":
            return [1 / (1 + math.exp(-v)) for v in u]
        case "l2":
            norm = math.sqrt(sum(v * v for v in u))
            return [v / norm if norm else 0.0 for v in u]
        case "abs":
            return [abs(v) for v in u]
    return list(u)


def chosen(spec, keys, threshold):
    """Indices that stay, and the distance of the nearest decision from a tie."""
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], i))
    if spec.select == "top_k":
        gap = 1.0 if spec.k == len(keys) else keys[order[spec.k - 1]] - keys[order[spec.k]]
        return set(order[: spec.k]), gap
    if spec.select == "threshold":
        gap = min(abs(k - threshold) for k in keys)
        return {i for i, k in enumerate(keys) if k >= threshold}, gap
    if spec.select == "top_p":
        stay, total, gap = set(), 0.0, 1.0
        for place, i in enumerate(order):
            gap = min(gap, abs(total - spec.top_p))
            if place and abs(keys[i] - keys[order[place - 1]]) < NEAR:
                gap = 0.0
            if total < spec.top_p:
                stay.add(i)
            total += keys[i]
        return stay, gap
    return set(order), 1.0


def oracle(spec, u, bias, head):
    """(gate per rank, distance from the nearest tie or zero division) of one token."""
    scores = scores_of(spec, u)
    keys = [s + (b if spec.bias != "none" else 0.0) for s, b in zip(scores, bias, strict=True)]
    values = keys if spec.bias == "value" else scores
    if spec.key == "abs":
        keys = [abs(k) for k in keys]
    threshold = spec.threshold
    if spec.threshold_head:
        threshold *= 1 / (1 + math.exp(-head))
    stay, gap = chosen(spec, keys, threshold)
    if spec.subtract_threshold:
        values = [v - threshold for v in values]
    gates = [0.0] * len(u)
    if spec.weight == "renormalise":
        total = sum(values[i] for i in stay)
        gap = min(gap, abs(total) / 100) if stay and total else gap
    elif spec.weight == "softmax":
        largest = max((values[i] for i in stay), default=0.0)
        total = sum(math.exp((values[i] - largest) / spec.temperature) for i in stay)
    for i in stay:
        match spec.weight:
            case "score":
                gates[i] = values[i]
            case "sqrt":
                gates[i] = math.sqrt(max(values[i], 0.0))
            case "one":
                gates[i] = 1.0
            case "renormalise":
                gates[i] = values[i] / (total or 1.0)
            case "softmax":
                gates[i] = math.exp((values[i] - largest) / spec.temperature) / total
    if spec.mask_below is not None:
        gap = min(gap, *(abs(s - spec.mask_below) for s in scores))
        gates = [g if s >= spec.mask_below else 0.0 for g, s in zip(gates, scores, strict=True)]
    ranks = [spec.constant * g for g, n in zip(gates, spec.blocks, strict=True) for _ in range(n)]
    return ranks, gap


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32 - 1), stable=st.booleans())
def test_equals_the_oracle(seed, stable):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng, sources=["router", "self", "request"], stable=stable, wide=True)
    u_TG = torch.from_numpy(rng.normal(size=(7, spec.num_gates)).astype(np.float32)) * 1.5
    bias_G = torch.from_numpy(rng.normal(size=spec.num_gates).astype(np.float32)) * 0.2
    head_T = torch.from_numpy(rng.normal(size=7).astype(np.float32))
    got_TR = gate_reference(
        spec, u_TG, bias_G if spec.bias != "none" else None, head_T if spec.threshold_head else None
    )
    assert got_TR.dtype == torch.float32
    assert got_TR.shape == (7, sum(spec.blocks))
    compared = 0
    for t in range(7):
        want, gap = oracle(spec, u_TG[t].tolist(), bias_G.tolist(), head_T[t].item())
        if gap > NEAR:
            compared += 1
            torch.testing.assert_close(got_TR[t], torch.tensor(want), atol=2e-4, rtol=2e-4)
    assume(compared)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_token_does_not_see_its_neighbours(seed):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng, sources=["router", "self"])
    u_TG = torch.from_numpy(rng.normal(size=(5, spec.num_gates)).astype(np.float32))
    bias_G = torch.zeros(spec.num_gates) if spec.bias != "none" else None
    head_T = torch.zeros(5) if spec.threshold_head else None
    whole = gate_reference(spec, u_TG, bias_G, head_T)
    for t in range(5):
        head = None if head_T is None else head_T[t : t + 1]
        alone = gate_reference(spec, u_TG[t : t + 1], bias_G, head)
        torch.testing.assert_close(alone[0], whole[t], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("select", ["top_k", "top_p"])
def test_ties_go_to_the_lower_index(select):
    fields = {"k": 2} if select == "top_k" else {"top_p": 0.5}
    spec = GateSpec(source="router", blocks=(1,) * 4, select=select, weight="one", **fields)
    gate = gate_reference(spec, torch.full((1, 4), 0.25))
    assert gate.tolist() == [[1, 1, 0, 0]]


def test_a_score_at_the_threshold_stays():
    spec = GateSpec(source="router", blocks=(1, 1), select="threshold", threshold=0.5, weight="one")
    assert gate_reference(spec, torch.tensor([[0.5, 0.25]])).tolist() == [[1, 0]]


@pytest.mark.parametrize("weight", ["score", "renormalise", "softmax", "one"])
def test_nothing_chosen_adds_nothing(weight):
    spec = GateSpec(
        source="router", blocks=(2, 1), select="threshold", threshold=9.0, weight=weight
    )
    assert gate_reference(spec, torch.tensor([[0.5, 0.25]])).tolist() == [[0, 0, 0]]
