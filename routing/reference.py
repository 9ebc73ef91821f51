"""The gate pipeline in plain fp32 PyTorch: the specification that every kernel is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_lora_ext.routing.attention import attention_reference
from vllm_lora_ext.routing.norm import InputNorm
from vllm_lora_ext.routing.rescale import Rescale
from vllm_lora_ext.routing.spec import GIVEN, GateSpec


class GatedSlice(Protocol):
    """What one adapter does to one linear layer, or to one slice of a fused one.

    a_RK [R, in], b_NR [out, R] with every scale folded in, router_GK [G, in], bias_G [G],
    head_K [in], norm; the last four where the gate asks for them. logit_bias_G [G] is added to a
    router's logits. a_RK has R / n rows when n experts share one A. row_start is the first of the
    numbers that come with each row which the gate reads. rescale is what happens to the layer's own
    output, if anything does. attention_PR [3 R, R] belongs to source `attention`.
    """

    @property
    def a_RK(self) -> torch.Tensor: ...
    @property
    def b_NR(self) -> torch.Tensor: ...
    @property
    def gate(self) -> GateSpec: ...
    @property
    def router_GK(self) -> torch.Tensor | None: ...
    @property
    def bias_G(self) -> torch.Tensor | None: ...
    @property
    def head_K(self) -> torch.Tensor | None: ...
    @property
    def head_bias(self) -> float: ...
    @property
    def logit_bias_G(self) -> torch.Tensor | None: ...
    @property
    def norm(self) -> InputNorm | None: ...
    @property
    def row_start(self) -> int: ...
    @property
    def rescale(self) -> Rescale | None: ...
    @property
    def attention_PR(self) -> torch.Tensor | None: ...


def delta_reference(
    s: GatedSlice, x_TK: torch.Tensor, rows_TG: torch.Tensor | None = None
) -> torch.Tensor:
    """`B (g(x) ⊙ (A x))`: what the adapter adds to the layer's output, [T, out] fp32.

    Args:
        x_TK: for source `attention`, one sequence from its first token on.
        rows_TG: [T, G] those of the numbers that came with each row which the gate reads, for
            sources `request`, `position`, `classifier`.
    """
    x_TK = x_TK.float()
    h_TR = x_TK @ s.a_RK.float().t()
    if s.gate.source == "attention":
        assert s.attention_PR is not None
        h_TR = h_TR + attention_reference(h_TR, s.attention_PR, s.gate.num_gates)
    elif s.gate.source != "none":
        head_T = None if s.head_K is None else x_TK @ s.head_K.float() + s.head_bias
        g_TR = gate_reference(s.gate, logits_reference(s, x_TK, rows_TG), s.bias_G, head_T)
        if s.gate.product:
            h_TR = (g_TR * h_TR).unflatten(1, (s.gate.num_gates, -1)).sum(dim=1)
        h_TR = g_TR * h_TR.repeat(1, g_TR.shape[1] // h_TR.shape[1])
    return h_TR @ s.b_NR.float().t()


def logits_reference(
    s: GatedSlice, x_TK: torch.Tensor, rows_TG: torch.Tensor | None = None
) -> torch.Tensor:
    """u [T, G] fp32 that the gate of a slice scores; arguments as for `delta_reference`."""
    if s.gate.source in GIVEN:
        assert rows_TG is not None
        return rows_TG.float()
    if s.router_GK is None:
        return x_TK.float() @ s.a_RK.float().t()
    if s.norm is None:
        u_TG = x_TK.float() @ s.router_GK.float().t()
    else:  # sums and squares lose digits that their difference needs
        x, w_GK = x_TK.double(), s.router_GK.double()
        sum_T, squares_T = x.sum(dim=1), x.square().sum(dim=1)
        u_TG = s.norm.logits(x @ w_GK.t(), sum_T, squares_T, s.gate.normalise_eps).float()
    return u_TG if s.logit_bias_G is None else u_TG + s.logit_bias_G.float()


def gate_reference(
    spec: GateSpec,
    u_TG: torch.Tensor,
    bias_G: torch.Tensor | None = None,
    head_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gate values of every token.

    Args:
        spec: the gate; its source must not be `none`.
        u_TG: [T, G] logits (`logits_reference`).
        bias_G: [G], when spec.bias is not `none`.
        head_T: [T], threshold head's logit `h x + c`, when spec.threshold_head.
    Returns:
        [T, R] fp32 gate per rank, R = sum(spec.blocks).
    """
    score_TG = _score(spec, u_TG.float())
    key_TG = score_TG
    if spec.bias != "none":
        assert bias_G is not None
        key_TG = score_TG + bias_G.float()
    value_TG = key_TG if spec.bias == "value" else score_TG
    if spec.key == "abs":
        key_TG = key_TG.abs()
    threshold_T1 = torch.full_like(score_TG[:, :1], spec.threshold)
    if spec.threshold_head:
        assert head_T is not None
        threshold_T1 = spec.threshold * torch.sigmoid(head_T.float())[:, None]
    kept_TG = _select(spec, key_TG, threshold_T1)
    if spec.subtract_threshold:
        value_TG = value_TG - threshold_T1
    g_TG = _weigh(spec, value_TG, kept_TG)
    if spec.mask_below is not None:
        g_TG = torch.where(score_TG >= spec.mask_below, g_TG, 0.0)
    return _by_rank(spec.constant * g_TG, spec.blocks)


def _by_rank(g_TG: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """[T, R]: every gate, for each rank of its block. No GPU is asked for the sizes."""
    if len(set(blocks)) == 1:
        return g_TG.repeat_interleave(blocks[0], dim=1)
    gates = zip(g_TG.split(1, dim=1), blocks, strict=True)
    return torch.cat([g_T1.expand(-1, size) for g_T1, size in gates], dim=1)


def _score(spec: GateSpec, u_TG: torch.Tensor) -> torch.Tensor:
    match spec.score:
        case "identity":
            return u_TG
        case "softmax":
            return torch.softmax(u_TG / spec.score_temperature, dim=-1)
        case "sigmoid":
            return torch.sigmoid(u_TG)
        case "l2":
            norm_T1 = u_TG.norm(dim=-1, keepdim=True)
            return torch.where(norm_T1 > 0, u_TG / norm_T1, 0.0)
        case "abs":
            return u_TG.abs()


def _select(spec: GateSpec, key_TG: torch.Tensor, threshold_T1: torch.Tensor) -> torch.Tensor:
    match spec.select:
        case "all":
            return torch.ones_like(key_TG, dtype=torch.bool)
        case "threshold":
            return key_TG >= threshold_T1
        case "top_k":
            order_TG = torch.sort(key_TG, dim=-1, descending=True, stable=True).indices
            kept_TG = torch.zeros_like(key_TG, dtype=torch.bool)
            return kept_TG.scatter_(1, order_TG[:, : spec.k], True)
        case "top_p":
            sorted_TG, order_TG = torch.sort(key_TG, dim=-1, descending=True, stable=True)
            before_TG = torch.cumsum(sorted_TG, dim=-1) - sorted_TG
            kept_TG = torch.zeros_like(key_TG, dtype=torch.bool)
            return kept_TG.scatter_(1, order_TG, before_TG < spec.top_p)


def _weigh(spec: GateSpec, value_TG: torch.Tensor, kept_TG: torch.Tensor) -> torch.Tensor:
    match spec.weight:
        case "one":
            return kept_TG.float()
        case "score":
            return torch.where(kept_TG, value_TG, 0.0)
        case "sqrt":
            return torch.where(kept_TG, value_TG.clamp_min(0).sqrt(), 0.0)
        case "renormalise":
            kept_value_TG = torch.where(kept_TG, value_TG, 0.0)
            sum_T1 = kept_value_TG.sum(dim=-1, keepdim=True)
            return kept_value_TG / torch.where(sum_T1 == 0, 1.0, sum_T1)
        case "softmax":
            logits_TG = torch.where(kept_TG, value_TG / spec.temperature, float("-inf"))
            return torch.nan_to_num(torch.softmax(logits_TG, dim=-1))  # nothing kept: zeros
