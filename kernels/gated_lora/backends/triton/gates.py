"""The gate table in Triton: for the kernels that expand.

    g = constant · mask( weight( select( score(u) + bias ) ) )        per gate, spread over ranks

The whole table (`routing.reference` is its specification) is evaluated in registers, over
[tile, ranks]: every rank carries the score of its gate, and sums over gates count the first rank
of each (`SlotTables`). A top-k of k gates costs k maxima over the row, ties to the lower index;
a top-p costs one for each gate. Where a slot holds several adapters, the ranks of a slice are
those of all: each gate table is evaluated over its own, and one product with B serves all.
"""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora.backends.triton.names import (
    A_ROWS,
    ABS_SCORE,
    AFFINE,
    AS_IT_IS,
    AX,
    BIAS,
    BIAS_KIND,
    BY_MAGNITUDE,
    CONSTANT,
    FACTOR,
    FACTORS,
    FIRST,
    GIVEN,
    HEAD,
    HEAD_BIAS,
    L2_SCORE,
    LOGIT,
    LOGIT_BIAS,
    MASK_BELOW,
    MASKED,
    NO_BIAS,
    NORMALISE_EPS,
    NORMALISED,
    NUM_SLICE,
    NUM_SPEC,
    NUM_VALUES,
    PICKS,
    PRODUCT,
    RANK_FLOATS,
    RANK_INTS,
    RENORMALISE,
    ROUTER_ROWS,
    ROW_SUM,
    SCORE,
    SCORE_TEMPERATURE,
    SCORE_WEIGHT,
    SELECT,
    SIGMOID_SCORE,
    SOFTMAX_SCORE,
    SOFTMAX_WEIGHT,
    SQRT_WEIGHT,
    START,
    STOP,
    SUBTRACT,
    TAIL,
    TAIL_SQUARES,
    TAIL_SUM,
    TEMPERATURE,
    THRESHOLD,
    THRESHOLD_VALUE,
    TOP_K,
    TOP_P,
    TOP_P_VALUE,
    VALUE_BIAS,
    WEIGHT,
    WIDTH,
)


@triton.jit
def gated(
    u_T,
    v_T,
    rows_T,
    slot_ptr,
    slice_ptr,
    floats_ptr,
    ranks,
    gates,
    at_T,
    ok_T,
    start,
    stop,
    max_rank,
    stride_u_part,
    shift,
    stride_router_part,
    PARTS: tl.constexpr,
    ROUTER_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`factor ⊙ g ⊙ A x` of a tile of rows of one slot at one slice, [T, R] fp32.

    u has A x, v what gates read, from pointers to their rows; `rows` the numbers that come with
    each. Both are in PARTS parts; or, where ROUTER_PARTS is not 0, in one, the routers' columns in
    so many, and `shift` columns further on than a slot's tables say (`extended`).
    """
    rank_R = tl.arange(0, BLOCK_R)
    ok_R = rank_R < ranks
    ok_TR = ok_T[:, None] & ok_R[None, :]
    vectors_R = slice_ptr + NUM_SLICE + rank_R
    at_R = tl.load(vectors_R + AX * max_rank, mask=ok_R, other=0)
    h_TR = sum_parts(u_T[:, None] + at_R[None, :], ok_TR, stride_u_part, PARTS)
    i = 0
    while i < gates:
        spec_ptr = slice_ptr + NUM_SLICE + RANK_INTS * max_rank + i * NUM_SPEC
        values_ptr = floats_ptr + RANK_FLOATS * max_rank + i * NUM_VALUES
        first, last = tl.load(spec_ptr + START), tl.load(spec_ptr + STOP)
        own_R = (rank_R >= first) & (rank_R < last)
        own_TR = ok_T[:, None] & own_R[None, :]
        logit_R = tl.load(vectors_R + LOGIT * max_rank, mask=own_R, other=0)
        first_R = tl.load(vectors_R + FIRST * max_rank, mask=own_R, other=0)
        floats_R = floats_ptr + rank_R
        bias_R = tl.load(floats_R + BIAS * max_rank, mask=own_R, other=0.0)
        head = tl.load(spec_ptr + HEAD)
        has_head_T = ok_T & (at_T < tl.where(head >= 0, stop, start))
        if tl.load(spec_ptr + GIVEN) != 0:  # given with the row
            logits_TR = tl.load(rows_T[:, None] + logit_R[None, :], mask=own_TR, other=0.0)
        elif ROUTER_PARTS == 0:
            logits_TR = sum_parts(v_T[:, None] + logit_R[None, :], own_TR, stride_u_part, PARTS)
            if tl.load(spec_ptr + AFFINE) != AS_IT_IS:
                stats_T = v_T + tl.load(slot_ptr + A_ROWS) + tl.load(slot_ptr + ROUTER_ROWS)
                logits_TR = _affine(
                    logits_TR, stats_T, floats_R, own_R, ok_T, spec_ptr, values_ptr,
                    stride_u_part, max_rank, PARTS,
                )  # fmt: skip
        else:
            of_router_R = logit_R >= tl.load(slot_ptr + A_ROWS)
            v_TR = v_T[:, None] + (logit_R + tl.where(of_router_R, shift, 0))[None, :]
            logits_TR = tl.load(v_TR, mask=own_TR, other=0.0)
            for part in tl.static_range(1, ROUTER_PARTS):
                more_TR = own_TR & of_router_R[None, :]
                logits_TR += tl.load(v_TR + part * stride_router_part, mask=more_TR, other=0.0)
            if tl.load(spec_ptr + AFFINE) != AS_IT_IS:
                bias_of_logit_R = tl.load(floats_R + LOGIT_BIAS * max_rank, mask=own_R, other=0.0)
                logits_TR += bias_of_logit_R[None, :]
        if ROUTER_PARTS == 0:
            head_T = sum_parts(v_T + head, has_head_T, stride_u_part, PARTS)
        else:
            head_T = sum_parts(v_T + head + shift, has_head_T, stride_router_part, ROUTER_PARTS)
        g_TR = gate(logits_TR, head_T, bias_R, rank_R, first_R, own_R, spec_ptr, values_ptr)
        block = tl.load(spec_ptr + PRODUCT)
        if block != 0:  # a product: one A x, mixed of all
            mixed_TR = tl.zeros_like(h_TR)
            e = first
            while e < last:
                g_T = tl.sum(tl.where((rank_R == e)[None, :], g_TR, 0.0), axis=1)
                ax_T = u_T[:, None] + (at_R + e - first)[None, :]
                mixed_TR += g_T[:, None] * sum_parts(ax_T, own_TR, stride_u_part, PARTS)
                e += block
            h_TR = tl.where(own_R[None, :], mixed_TR, h_TR)
        h_TR = tl.where(own_R[None, :], h_TR * g_TR, h_TR)
        i += 1
    if tl.load(slice_ptr + FACTORS) != 0:
        factor_R = tl.load(vectors_R + FACTOR * max_rank, mask=ok_R, other=-1)
        has_TR = ok_TR & (factor_R >= 0)[None, :]
        h_TR *= tl.load(rows_T[:, None] + factor_R[None, :], mask=has_TR, other=1.0)
    return h_TR


@triton.jit
def sum_parts(u, ok, stride, PARTS: tl.constexpr):
    """u in fp32, its parts added in order; four loads in flight at once."""
    AT_ONCE: tl.constexpr = 4 if PARTS % 4 == 0 else PARTS
    total = tl.load(u, mask=ok, other=0.0)
    for i in tl.static_range(1, AT_ONCE):
        total += tl.load(u + i * stride, mask=ok, other=0.0)
    for part in range(AT_ONCE, PARTS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(u + (part + i) * stride, mask=ok, other=0.0)
    return total


@triton.jit
def _affine(
    u_TR,
    stats_T,
    floats_R,
    own_R,
    ok_T,
    spec_ptr,
    values_ptr,
    stride_part,
    max_rank,
    PARTS: tl.constexpr,
):
    """A router's logits with their bias, of LayerNorm(x) where it reads that (`routing.norm`)."""
    if tl.load(spec_ptr + AFFINE) == NORMALISED:
        width = tl.load(values_ptr + WIDTH)
        mean_T = sum_parts(stats_T, ok_T, stride_part, PARTS) + tl.load(values_ptr + TAIL_SUM)
        mean_T /= width
        squares_T = sum_parts(stats_T + 1, ok_T, stride_part, PARTS)
        var_T = squares_T + tl.load(values_ptr + TAIL_SQUARES)
        var_T = tl.maximum(var_T / width - mean_T * mean_T, 0.0)
        std_T = tl.sqrt(var_T + tl.load(values_ptr + NORMALISE_EPS))
        sums_R = tl.load(floats_R + ROW_SUM * max_rank, mask=own_R, other=0.0)
        tail_R = tl.load(floats_R + TAIL * max_rank, mask=own_R, other=0.0)
        u_TR = (u_TR + tail_R[None, :] - mean_T[:, None] * sums_R[None, :]) / std_T[:, None]
    return u_TR + tl.load(floats_R + LOGIT_BIAS * max_rank, mask=own_R, other=0.0)[None, :]


@triton.jit
def gate(logits_TR, head_T, bias_R, rank_R, first_R, ok_R, spec_ptr, values_ptr):
    """Gate of every rank. `once` marks one rank per gate."""
    score_kind, bias_kind = tl.load(spec_ptr + SCORE), tl.load(spec_ptr + BIAS_KIND)
    select, by_magnitude = tl.load(spec_ptr + SELECT), tl.load(spec_ptr + BY_MAGNITUDE)
    picks, head = tl.load(spec_ptr + PICKS), tl.load(spec_ptr + HEAD)
    subtract, weight_kind = tl.load(spec_ptr + SUBTRACT), tl.load(spec_ptr + WEIGHT)
    masked = tl.load(spec_ptr + MASKED)
    score_temperature = tl.load(values_ptr + SCORE_TEMPERATURE)
    threshold, head_bias = tl.load(values_ptr + THRESHOLD_VALUE), tl.load(values_ptr + HEAD_BIAS)
    top_p, temperature = tl.load(values_ptr + TOP_P_VALUE), tl.load(values_ptr + TEMPERATURE)
    mask_below, constant = tl.load(values_ptr + MASK_BELOW), tl.load(values_ptr + CONSTANT)

    ok = ok_R[None, :]
    once = ok & (first_R == rank_R)[None, :]
    score_TR = _score(logits_TR, ok, once, score_kind, score_temperature)
    key_TR = score_TR
    if bias_kind != NO_BIAS:
        key_TR += bias_R[None, :]
    value_TR = score_TR
    if bias_kind == VALUE_BIAS:
        value_TR = key_TR
    if by_magnitude != 0:
        key_TR = tl.abs(key_TR)
    threshold_T = tl.zeros_like(head_T) + threshold
    if head >= 0:
        threshold_T *= tl.sigmoid(head_T + head_bias)
    kept_TR = _select(key_TR, ok, once, first_R, threshold_T, select, picks, top_p)
    if subtract != 0:
        value_TR -= threshold_T[:, None]
    g_TR = _weigh(value_TR, kept_TR, once, weight_kind, temperature)
    if masked != 0:
        g_TR = tl.where(score_TR >= mask_below, g_TR, 0.0)
    return g_TR * constant


@triton.jit
def _score(u_TR, ok, once, kind, temperature):
    score_TR = u_TR
    if kind == SOFTMAX_SCORE:
        z_TR = tl.where(ok, u_TR / temperature, float("-inf"))
        e_TR = tl.exp(z_TR - tl.max(z_TR, axis=1)[:, None])
        score_TR = e_TR / tl.sum(tl.where(once, e_TR, 0.0), axis=1)[:, None]
    elif kind == SIGMOID_SCORE:
        score_TR = tl.sigmoid(u_TR)
    elif kind == L2_SCORE:
        norm_T = tl.sqrt(tl.sum(tl.where(once, u_TR * u_TR, 0.0), axis=1))
        score_TR = u_TR / tl.where(norm_T > 0, norm_T, 1.0)[:, None]
    elif kind == ABS_SCORE:
        score_TR = tl.abs(u_TR)
    return score_TR


@triton.jit
def _select(key_TR, ok, once, first_R, threshold_T, select, picks, top_p):
    """Which ranks stay. The search takes the largest key left, `picks` times."""
    kept_TR = tl.broadcast_to(ok, key_TR.shape)
    if select == THRESHOLD:
        kept_TR = ok & (key_TR >= threshold_T[:, None])
    elif (select == TOP_K) | (select == TOP_P):
        kept_TR = kept_TR & (first_R < 0)[None, :]
        left_TR = tl.where(once, key_TR, float("-inf"))
        before_T = tl.zeros_like(threshold_T)
        for _ in range(picks):
            best_T, at_T = tl.max(left_TR, axis=1, return_indices=True)
            hit_TR = ok & (first_R[None, :] == at_T[:, None])
            kept_TR = kept_TR | (hit_TR & ((select == TOP_K) | (before_T < top_p))[:, None])
            before_T += best_T
            left_TR = tl.where(hit_TR, float("-inf"), left_TR)
    return kept_TR


@triton.jit
def _weigh(value_TR, kept_TR, once, kind, temperature):
    g_TR = tl.where(kept_TR, 1.0, 0.0)
    if (kind == SCORE_WEIGHT) | (kind == RENORMALISE):
        g_TR = tl.where(kept_TR, value_TR, 0.0)
    elif kind == SOFTMAX_WEIGHT:
        z_TR = tl.where(kept_TR, value_TR / temperature, float("-inf"))
        top_T = tl.max(z_TR, axis=1)
        top_T = tl.where(top_T == float("-inf"), 0.0, top_T)  # nothing kept: zeros
        g_TR = tl.exp(z_TR - top_T[:, None])
    elif kind == SQRT_WEIGHT:
        g_TR = tl.where(kept_TR, tl.sqrt(tl.where(value_TR < 0, 0.0, value_TR)), 0.0)
    if (kind == RENORMALISE) | (kind == SOFTMAX_WEIGHT):
        sum_T = tl.sum(tl.where(once, g_TR, 0.0), axis=1)
        g_TR = g_TR / tl.where(sum_T == 0, 1.0, sum_T)[:, None]
    return g_TR
