"""Rows of the gate table against the systems' formulas, written straight from their definitions."""

from __future__ import annotations

import pytest
import torch

from vllm_lora_ext.routing import GateSpec, gate_reference

E, R, T = 6, 24, 40


@pytest.fixture
def u_TE():
    return torch.randn(T, E, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def z_TR():
    return torch.randn(T, R, generator=torch.Generator().manual_seed(2))


def check(spec, u, want, **tensors):
    torch.testing.assert_close(gate_reference(spec, u, **tensors), want, atol=1e-6, rtol=1e-5)


def scattered(values, index, size):
    return torch.zeros(len(values), size).scatter(1, index, values)


def test_loramoe_and_hydralora(u_TE):
    """Dense softmax, expert rank 3."""
    spec = GateSpec(source="router", blocks=(3,) * E, score="softmax")
    check(spec, u_TE, torch.softmax(u_TE, -1).repeat_interleave(3, dim=1))


@pytest.mark.parametrize(("k", "temperature"), [(2, 1.0), (2, 15.0), (3, 1.0), (1, 20.0)])
def test_meteora(u_TE, k, temperature):
    """Top-k logits, then a softmax at temperature T over them; k = 1 has weight 1."""
    spec = GateSpec(
        source="router", blocks=(4,) * E, select="top_k", k=k, weight="softmax",
        temperature=temperature,
    )  # fmt: skip
    top = torch.topk(u_TE, k)
    weights = torch.softmax(top.values / temperature, -1)
    check(spec, u_TE, scattered(weights, top.indices, E).repeat_interleave(4, dim=1))


def test_mola_is_softmax_top_k_renormalised_and_equals_meteora_at_one(u_TE):
    spec = GateSpec(
        source="router", blocks=(2,) * E, score="softmax", select="top_k", k=2,
        weight="renormalise",
    )  # fmt: skip
    top = torch.topk(torch.softmax(u_TE, -1), 2)
    weights = top.values / top.values.sum(-1, keepdim=True)
    want = scattered(weights, top.indices, E).repeat_interleave(2, dim=1)
    check(spec, u_TE, want)
    meteora = GateSpec(source="router", blocks=(2,) * E, select="top_k", k=2, weight="softmax")
    check(meteora, u_TE, want)


@pytest.mark.parametrize("partition", [1, 4])
def test_smora(z_TR, partition):
    """Sigmoid scores of rank groups plus a bias that counts in the choice and in the value.

    The ranks of a group share one score, and with equal biases inside a group they are chosen
    together, so k counts groups here. Over all ranks the gates sum to `activate_r`.
    """
    groups, active = R // partition, 8
    u, bias = z_TR[:, :groups], torch.linspace(-0.3, 0.3, groups)
    q = (torch.sigmoid(u) + bias).repeat_interleave(partition, dim=1)
    top = torch.topk(q, active)
    want = scattered(top.values / top.values.sum(-1, keepdim=True) * active, top.indices, R)
    spec = GateSpec(
        source="router", blocks=(partition,) * groups, score="sigmoid", bias="value",
        select="top_k", k=active // partition, weight="renormalise",
        constant=float(active // partition),
    )  # fmt: skip
    check(spec, u, want, bias_G=bias)


@pytest.mark.parametrize("key", ["signed", "abs"])
def test_flylora(z_TR, key):
    """A 0/1 mask of the k largest A x + d, signed or by magnitude; d only chooses."""
    bias = torch.linspace(-0.5, 0.5, R)
    ranked = z_TR + bias if key == "signed" else (z_TR + bias).abs()
    want = scattered(torch.ones(T, 8), torch.topk(ranked, 8).indices, R)
    spec = GateSpec(
        source="self", blocks=(1,) * R, bias="select", select="top_k", key=key, k=8, weight="one"
    )
    check(spec, z_TR, want, bias_G=bias)


@pytest.mark.parametrize(("tau", "delta"), [(0.01, 0.0), (0.03, 0.2), (0.03, 0.4)])
def test_moram(z_TR, tau, delta):
    """Softmax over the k largest of the normalised A x, then a mask without renormalising."""
    n = z_TR / z_TR.norm(dim=-1, keepdim=True)
    top = torch.topk(n, 4)
    weights = torch.softmax(top.values / tau, -1) * (top.values >= delta)
    spec = GateSpec(
        source="self", blocks=(1,) * R, score="l2", select="top_k", k=4, weight="softmax",
        temperature=tau, mask_below=delta,
    )  # fmt: skip
    check(spec, z_TR, scattered(weights, top.indices, R))


def test_arrow(u_TE):
    """Magnitude of the projection on each prototype, top-k, softmax at a temperature."""
    spec = GateSpec(
        source="prototype", blocks=(4,) * E, score="abs", select="top_k", k=3, weight="softmax",
        temperature=0.7,
    )  # fmt: skip
    top = torch.topk(u_TE.abs(), 3)
    weights = torch.softmax(top.values / 0.7, -1)
    check(spec, u_TE, scattered(weights, top.indices, E).repeat_interleave(4, dim=1))


def test_adamole(u_TE):
    """relu(p - t(x)), renormalised; t(x) = 1/E sigmoid(head), so one expert always stays."""
    head_T = torch.linspace(-3, 3, T)
    t = torch.sigmoid(head_T)[:, None] / E
    a = torch.relu(torch.softmax(u_TE, -1) - t)
    want = (a / a.sum(-1, keepdim=True)).repeat_interleave(2, dim=1)
    spec = GateSpec(
        source="router", blocks=(2,) * E, score="softmax", select="threshold", threshold=1 / E,
        threshold_head=True, subtract_threshold=True, weight="renormalise",
    )  # fmt: skip
    check(spec, u_TE, want, head_T=head_T)


def test_mole_fixed_threshold(u_TE):
    """p >= threshold, renormalised; where no expert passes, nothing is added."""
    p = torch.softmax(u_TE, -1)
    kept = torch.where(p >= 0.35, p, 0.0)
    total = kept.sum(-1, keepdim=True)
    want = torch.where(total > 0, kept / total, 0.0)
    assert (total == 0).any(), "the data must hold a token that chooses nobody"
    spec = GateSpec(
        source="router", blocks=(1,) * E, score="softmax", select="threshold", threshold=0.35,
        weight="renormalise",
    )  # fmt: skip
    check(spec, u_TE, want)


def test_top_p_keeps_the_expert_that_crosses(u_TE):
    p = torch.softmax(u_TE / 0.5, -1)
    want = torch.zeros(T, E)
    for t in range(T):
        total = 0.0
        for e in torch.argsort(p[t], descending=True).tolist():
            if total >= 0.8:
                break
            want[t, e] = p[t, e]
            total += p[t, e].item()
    spec = GateSpec(
        source="router", blocks=(1,) * E, score="softmax", score_temperature=0.5, select="top_p",
        top_p=0.8,
    )  # fmt: skip
    check(spec, u_TE, want)
