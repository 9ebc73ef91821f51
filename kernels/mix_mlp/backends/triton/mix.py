"""The one launch of a MixLoRA block on a GPU, between its two linears:

    a_e = act(gate(x) + B_g^e h_g^e) * (up(x) + B_u^e h_u^e)        h = A x, of the first shrink
    a   = sum_e v_e a_e             replaces the activation of these rows
    z_e = v_e A_d^e a_e             goes where the second linear's shrink would put it

The weights v come from the router's logits in h, by the gate table of `gated_lora`. One program
takes one tile of rows of one slot (`StepMap`) and a part of the inner columns; it walks over them,
and for each over the experts that some row of its tile has chosen. The products run over all ranks
with the other experts' rows of B and A_d left out, so that experts may have any rank; that costs
E times the multiplications and no more bytes. z is summed over the parts, in order, by the second
linear's expand; the parts are as many as that shrink has of its K, so that rows of both share one
layout.

What the experts change may be multiplied, by a number of the slot and one that comes with the row:
a = base + s (mixed - base), and z likewise. The rows' own activations are there already.

The launch is there in every step that has an adapter, so that a captured graph has it whatever it
was captured with; a program whose slot has no experts here leaves at once.

Rows come in tiles of 16 (`TILE`), at prefill too: nothing here is tuned, and no product is
asynchronous (`gated_lora.tuning`). `COLUMNS` inner columns are in registers at once.
"""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora.backends.triton.gates import gate as gate_of
from vllm_lora_ext.kernels.gated_lora.backends.triton.gates import sum_parts
from vllm_lora_ext.kernels.gated_lora.backends.triton.names import (
    BIAS,
    COUNTS,
    FIRST,
    HEAD,
    LOGIT,
    NUM_SLICE,
    RANK_FLOATS,
    RANK_INTS,
    RANKS,
    rows_of,
)  # fmt: skip
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import operand
from vllm_lora_ext.kernels.gated_lora.backends.triton.store import store_of
from vllm_lora_ext.kernels.gated_lora.backends.triton.tiles import activate
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import warps_of
from vllm_lora_ext.kernels.gated_lora.step import max_tiles
from vllm_lora_ext.kernels.mix_mlp.backends.triton import tables

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.mix_mlp.block import BlockSite

TILE, COLUMNS = 16, 64
FIRST_AT, UP_AT, DOWN, ACTIVATION, FACTOR_AT, SCALE = (
    tl.constexpr(i) for i in range(len(tables.HEADER))
)
NUM_HEADER = tl.constexpr(len(tables.HEADER))


@triton.jit(
    do_not_specialize=[
        "num_tokens", "max_rank", "stride_u_part", "stride_u", "stride_z_part", "stride_z",
        "stride_ints", "stride_floats", "stride_block", "stride_tiles", "stride_rows",
    ]
)  # fmt: skip
def mix_kernel(
    a_ptr,
    base_ptr,
    u_ptr,
    z_ptr,
    b_ptr,
    down_ptr,
    ints_ptr,
    floats_ptr,
    block_ptr,
    order_ptr,
    tiles_ptr,
    rows_ptr,
    num_tokens,
    inner,
    max_rank,
    stride_a,
    stride_base,
    stride_u_part,
    stride_u,
    stride_z_part,
    stride_z,
    stride_b_slot,
    stride_b,
    stride_down_slot,
    stride_down,
    stride_ints,
    stride_floats,
    stride_block,
    stride_tiles,
    stride_rows,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    slice_ptr = ints_ptr + slot * stride_ints + COUNTS
    floats_ptr += slot * stride_floats
    ranks = tl.load(slice_ptr + RANKS)
    if ranks == 0:
        return
    tile_start, tile_stop, at_T, ok_T, token_T = rows_of(
        tile, tiles_ptr, order_ptr, stride_tiles, num_tokens, BLOCK_T
    )
    rank_R = tl.arange(0, BLOCK_R)
    ok_R = rank_R < ranks
    ok_TR = ok_T[:, None] & ok_R[None, :]
    u_T = u_ptr + token_T * stride_u

    spec_ptr = slice_ptr + NUM_SLICE + RANK_INTS * max_rank
    values_ptr = floats_ptr + RANK_FLOATS * max_rank
    vectors_R = slice_ptr + NUM_SLICE + rank_R
    logit_R = tl.load(vectors_R + LOGIT * max_rank, mask=ok_R, other=0)
    first_R = tl.load(vectors_R + FIRST * max_rank, mask=ok_R, other=0)
    bias_R = tl.load(floats_ptr + BIAS * max_rank + rank_R, mask=ok_R, other=0.0)
    logits_TR = sum_parts(u_T[:, None] + logit_R[None, :], ok_TR, stride_u_part, PARTS)
    head = tl.load(spec_ptr + HEAD)
    has_head_T = ok_T & (at_T < tl.where(head >= 0, tile_stop, tile_start))
    head_T = sum_parts(u_T + head, has_head_T, stride_u_part, PARTS)
    v_TR = gate_of(logits_TR, head_T, bias_R, rank_R, first_R, ok_R, spec_ptr, values_ptr)
    v_TR = tl.where(ok_TR, v_TR, 0.0)

    block_ptr += slot * stride_block
    first_at, up_at = tl.load(block_ptr + FIRST_AT), tl.load(block_ptr + UP_AT)
    down, kind = tl.load(block_ptr + DOWN), tl.load(block_ptr + ACTIVATION)
    factor_at = tl.load(block_ptr + FACTOR_AT)
    scale = tl.load(block_ptr + SCALE).to(tl.float32, bitcast=True)
    by_row_T = ok_T & (at_T < tl.where(factor_at >= 0, tile_stop, tile_start))
    factor_T = scale * tl.load(rows_ptr + token_T * stride_rows + factor_at, by_row_T, other=1.0)
    h_T = u_T[:, None] + rank_R[None, :]
    has_first_TR = ok_TR & (rank_R < tl.where(first_at >= 0, ranks, 0))[None, :]
    first_TR = sum_parts(h_T + first_at, has_first_TR, stride_u_part, PARTS)
    has_up_TR = ok_TR & (rank_R < tl.where(up_at >= 0, ranks, 0))[None, :]
    up_TR = sum_parts(h_T + up_at, has_up_TR, stride_u_part, PARTS)
    first_TR = first_TR.to(b_ptr.dtype.element_ty).to(OPERAND)
    up_TR = up_TR.to(b_ptr.dtype.element_ty).to(OPERAND)
    b_R = b_ptr + slot * stride_b_slot + rank_R.to(tl.int64) * stride_b
    down_R = down_ptr + slot * stride_down_slot + rank_R.to(tl.int64) * stride_down
    base_T = base_ptr + token_T * stride_base

    part = tl.program_id(0)
    length = tl.cdiv(inner, tl.num_programs(0) * BLOCK_N) * BLOCK_N
    begin = part * length
    z_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for n in range(begin, tl.minimum(begin + length, inner), BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        ok_N = n_N < inner
        ok_TN = ok_T[:, None] & ok_N[None, :]
        base_TN = tl.load(base_T[:, None] + n_N[None, :], mask=ok_TN, other=0.0).to(tl.float32)
        up_TN = base_TN
        if GATED:
            n_up_N = inner + n_N
            up_TN = tl.load(base_T[:, None] + n_up_N[None, :], mask=ok_TN, other=0.0)
            up_TN = up_TN.to(tl.float32)
        mixed_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        rank = 0
        while rank < ranks:
            stop = tl.load(block_ptr + NUM_HEADER + rank)
            v_T = tl.sum(tl.where((rank_R == rank)[None, :], v_TR, 0.0), axis=1)
            chosen_T = v_T != 0
            if tl.max(chosen_T.to(tl.int32), axis=0) != 0:
                own_R = (rank_R >= rank) & (rank_R < stop)
                own_RN = own_R[:, None] & ok_N[None, :]
                a_TN = base_TN
                if first_at >= 0:
                    b_RN = tl.load(b_R[:, None] + n_N[None, :], mask=own_RN, other=0.0)
                    a_TN += tl.dot(first_TR, b_RN.to(OPERAND), input_precision="tf32x3")
                a_TN = activate(a_TN, kind)
                if GATED:
                    e_up_TN = up_TN
                    if up_at >= 0:
                        b_RN = tl.load(b_R[:, None] + n_up_N[None, :], mask=own_RN, other=0.0)
                        e_up_TN += tl.dot(up_TR, b_RN.to(OPERAND), input_precision="tf32x3")
                    a_TN *= e_up_TN
                a_TN = tl.where(chosen_T[:, None], v_T[:, None] * a_TN, 0.0)
                mixed_TN += a_TN
                if down != 0:
                    d_RN = tl.load(down_R[:, None] + n_N[None, :], mask=own_RN, other=0.0)
                    rounded_TN = a_TN.to(down_ptr.dtype.element_ty).to(OPERAND)
                    d_NR = tl.trans(d_RN.to(OPERAND))
                    z_TR = tl.dot(rounded_TN, d_NR, z_TR, input_precision="tf32x3")
            rank = stop
        own_TN = a_ptr + (token_T * stride_a)[:, None] + n_N[None, :]
        if (factor_at >= 0) | (scale != 1.0):
            base_TN = tl.load(own_TN, mask=ok_TN, other=0.0).to(tl.float32)
            mixed_TN = base_TN + factor_T[:, None] * (mixed_TN - base_TN)
        tl.store(own_TN, mixed_TN.to(a_ptr.dtype.element_ty), mask=ok_TN)
    if down != 0:
        z_TR *= factor_T[:, None]
        z_T = z_ptr + part.to(tl.int64) * stride_z_part + token_T * stride_z
        tl.store(z_T[:, None] + rank_R[None, :], z_TR, mask=ok_TR)


def mix_(
    a_TI: torch.Tensor,
    z_PTR: torch.Tensor,
    base_TN: torch.Tensor,
    u_PTR: torch.Tensor,
    block: BlockSite,
) -> None:
    """Puts the mixed activations into the rows of a that have experts here, and what the second
    linear's shrink would make of them into those rows of z.

    Args:
        a_TI: [T, inner], base_TN: [T, gate | up] or [T, inner]; columns adjacent.
        z_PTR: [parts, T, block.last.num_rows] fp32, for the second linear's shrink to fill further.
        u_PTR: [parts, T, block.first.num_rows] fp32, the first linear's shrink.
    """
    assert a_TI.stride(1) == base_TN.stride(1) == 1
    num_tokens, inner = a_TI.shape
    if not num_tokens:
        return
    first, own = block.first, tables.tables_of(block)
    gate, tiles, b_SRN = own.gate, first.step.tiles(TILE), store_of(first).b_SRN
    rows_TC = block.rows_TC
    mix_kernel[(len(z_PTR), max_tiles(num_tokens, len(b_SRN), TILE))](
        a_TI,
        base_TN,
        u_PTR,
        z_PTR,
        b_SRN,
        block.last.a_SRK,
        gate.ints_SI,
        gate.floats_SF,
        own.ints_SI,
        first.step.order_T,
        tiles,
        gate.floats_SF if rows_TC is None else rows_TC,
        num_tokens,
        inner,
        first.max_rank,
        a_TI.stride(0),
        base_TN.stride(0),
        u_PTR.stride(0),
        u_PTR.stride(1),
        z_PTR.stride(0),
        z_PTR.stride(1),
        b_SRN.stride(0),
        b_SRN.stride(1),
        block.last.a_SRK.stride(0),
        block.last.a_SRK.stride(1),
        gate.ints_SI.stride(0),
        gate.floats_SF.stride(0),
        own.ints_SI.stride(0),
        tiles.stride(0),
        0 if rows_TC is None else rows_TC.stride(0),
        PARTS=len(u_PTR),
        GATED=base_TN.shape[1] == 2 * inner,
        BLOCK_T=TILE,
        BLOCK_R=first.padded_rank,
        BLOCK_N=COLUMNS,
        OPERAND=operand(b_SRN),
        num_warps=min(32, warps_of(TILE, first.padded_rank) * b_SRN.itemsize // 2),
        num_stages=1,
    )
