"""Routers that read LayerNorm(x), or LayerNorm([x, u]), and products of two mixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.routing import GateSpec, InputNorm, delta_reference, logits_reference

T, K, N, G, R = 5, 24, 7, 4, 3
GATE = GateSpec(
    source="router", blocks=(R,) * G, score="softmax", normalise="layer", normalise_eps=1e-4
)


def module(gate, tail=0):
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    return RoutedModule(normal(G * R, K), normal(N, G * R), gate), normal(G, K + tail), normal


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_a_routers_layer_norm_is_that_of_pytorch(tail, mean):
    m, router_GM, normal = module(GATE, tail)
    x_TK, u_M = normal(T, K) + mean, normal(tail) * 2
    gamma_M, beta_M, bias_G = normal(K + tail), normal(K + tail), normal(G)
    z_TM = torch.cat([x_TK, u_M.expand(T, tail)], dim=1).double()
    want_TM = torch.nn.functional.layer_norm(
        z_TM, z_TM.shape[1:], gamma_M.double(), beta_M.double(), eps=1e-4
    )
    want_TG = want_TM @ router_GM.double().t() + bias_G
    folded_GM = router_GM * gamma_M
    m = replace(
        m, router_GK=folded_GM[:, :K], logit_bias_G=router_GM @ beta_M + bias_G,
        norm=InputNorm.of(folded_GM, u_M if tail else None),
    )  # fmt: skip
    got_TG = logits_reference(m, x_TK)
    torch.testing.assert_close(got_TG.double(), want_TG, rtol=1e-4, atol=1e-4)


def test_a_product_mixes_a_and_b_apart():
    gate = GateSpec(source="request", blocks=(R,) * G, product=True)
    m, _, normal = module(gate)
    x_TK, g_TG = normal(T, K), normal(T, G)
    a_GRK, b_GNR = m.a_RK.view(G, R, K), torch.stack(m.b_NR.split(R, dim=1))
    want = torch.stack([
        torch.einsum("g,gnr->nr", g, b_GNR) @ torch.einsum("g,grk->rk", g, a_GRK) @ x
        for g, x in zip(g_TG, x_TK, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(delta_reference(m, x_TK, g_TG), want, rtol=1e-4, atol=1e-4)


def test_numbers_that_come_with_the_rows_are_the_logits():
    gate = GateSpec(source="position", blocks=(R,) * G, select="top_k", k=1, weight="one")
    m, _, normal = module(gate)
    x_TK = normal(T, K)
    rows_TG = torch.eye(G)[[2, 0, 0, 3, 1]]
    for t, e in enumerate([2, 0, 0, 3, 1]):
        of = slice(e * R, e * R + R)
        want = m.b_NR[:, of] @ m.a_RK[of] @ x_TK[t]
        torch.testing.assert_close(delta_reference(m, x_TK, rows_TG)[t], want)
