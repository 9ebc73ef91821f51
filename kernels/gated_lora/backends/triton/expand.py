"""Second launch: gates, and `y += B (g ⊙ A x)`, for all slices of a layer.

    y[t, n] += sum_r B[slot(t), r, n] · factor[t, r] · g[t, r] · (A x)[t, r]

where y is first scaled and shifted, column by column, if the slot says so (DoRA).

One program takes one tile of rows of one slot (`StepMap`) and `WALK` columns of one slice. It
loads only those rows of B whose gate is open for some row of its tile: at decode a top-2 router of
8 experts reads a quarter of B. It owns its part of y, so no two programs add to one number.
"""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora.backends.triton.gates import gated
from vllm_lora_ext.kernels.gated_lora.backends.triton.names import (
    COUNTS,
    GATES,
    MAX_GATES,
    NUM_SLICE,
    NUM_SPEC,
    NUM_VALUES,
    RANK_FLOATS,
    RANK_INTS,
    RANKS,
    RESCALED,
    rows_of,
)
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import operand
from vllm_lora_ext.kernels.gated_lora.backends.triton.store import store_of
from vllm_lora_ext.kernels.gated_lora.backends.triton.tiles import add
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import blocks, device_of
from vllm_lora_ext.kernels.gated_lora.step import max_tiles

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site


@triton.jit(
    do_not_specialize=[
        "num_tokens", "max_rank", "width", "stride_u_part", "stride_u", "stride_rows",
        "stride_ints", "stride_floats", "stride_tiles",
    ]
)  # fmt: skip
def expand_kernel(
    y_ptr,
    u_ptr,
    v_ptr,
    rows_ptr,
    b_ptr,
    ints_ptr,
    floats_ptr,
    columns_ptr,
    rescale_ptr,
    order_ptr,
    tiles_ptr,
    num_tokens,
    max_rank,
    width,
    stride_y,
    stride_u_part,
    stride_u,
    stride_rows,
    stride_b_slot,
    stride_b,
    stride_ints,
    stride_floats,
    stride_tiles,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WALK: tl.constexpr,
    EVEN_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tl.program_id(2)
    slot = tl.load(tiles_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    part = tl.program_id(1)
    slot_ptr = ints_ptr + slot * stride_ints
    slice_ints = NUM_SLICE + RANK_INTS * max_rank + MAX_GATES * NUM_SPEC
    slice_floats = RANK_FLOATS * max_rank + MAX_GATES * NUM_VALUES
    slice_ptr = slot_ptr + COUNTS + part * slice_ints
    floats_ptr += slot * stride_floats + part * slice_floats
    ranks = tl.load(slice_ptr + RANKS)
    column = tl.load(columns_ptr + 2 * part)
    size = tl.load(columns_ptr + 2 * part + 1)
    if EVEN_N:  # then B and y are read and written 16 bytes at a time
        column, size = tl.multiple_of(column, 16), tl.multiple_of(size, 16)
    begin = tl.program_id(0) * WALK
    if (ranks == 0) | (begin >= size):
        return

    start, stop, at_T, ok_T, token_T = rows_of(
        tile, tiles_ptr, order_ptr, stride_tiles, num_tokens, BLOCK_T
    )
    u_T = u_ptr + token_T * stride_u
    v_T = v_ptr + token_T * stride_u
    rows_T = rows_ptr + token_T * stride_rows
    h_TR = gated(
        u_T, v_T, rows_T, slot_ptr, slice_ptr, floats_ptr, ranks, tl.load(slice_ptr + GATES),
        at_T, ok_T, start, stop, max_rank, stride_u_part, 0, 0, PARTS, 0, BLOCK_R,
    )  # fmt: skip
    b_R = b_ptr + slot * stride_b_slot + tl.arange(0, BLOCK_R).to(tl.int64) * stride_b + column
    y_T = y_ptr + token_T * stride_y + column
    scale_N = tl.load(rescale_ptr).to(tl.pointer_type(tl.float32)) + slot * 2 * width + column
    end = tl.minimum(begin + WALK, size)
    add(
        y_T, y_T, y_ptr, 0, h_TR, b_R, scale_N, tl.load(slice_ptr + RESCALED), width, ok_T, begin,
        end, size, BLOCK_N, OPERAND,
    )  # fmt: skip


def expand_(
    y_TN: torch.Tensor, u_PTR: torch.Tensor, site: Site, v_PTR: torch.Tensor | None = None
) -> None:
    """Adds `B (g ⊙ A x)` to y in place.

    Args:
        y_TN: [T, N], columns adjacent; fp32, fp16 or bf16, as the site's weights.
        u_PTR: [parts, T, site.num_rows] fp32, from `shrink`.
        v_PTR: what the gates read, in the strides of u; by default u.
    """
    slot_tables, b_SRN = store_of(site).tables, store_of(site).b_SRN
    assert y_TN.stride(1) == 1
    num_tokens = y_TN.shape[0]
    if not num_tokens:
        return
    device = device_of(y_TN.device.index)
    _, e = blocks(num_tokens, site.padded_rank, b_SRN.itemsize, device)
    tiles, rows_TC = site.step.tiles(e.tile), site.rows_TC
    grid = (
        triton.cdiv(max(site.slice_sizes), e.walk),
        len(site.slice_sizes),
        max_tiles(num_tokens, len(b_SRN), e.tile),
    )
    expand_kernel[grid](
        y_TN,
        u_PTR,
        u_PTR if v_PTR is None else v_PTR,
        u_PTR if rows_TC is None else rows_TC,
        b_SRN,
        slot_tables.ints_SI,
        slot_tables.floats_SF,
        slot_tables.columns_S2,
        store_of(site).rescale_1,
        site.step.order_T,
        tiles,
        num_tokens,
        site.max_rank,
        b_SRN.shape[2],
        y_TN.stride(0),
        u_PTR.stride(0),
        u_PTR.stride(1),
        0 if rows_TC is None else rows_TC.stride(0),
        b_SRN.stride(0),
        b_SRN.stride(1),
        slot_tables.ints_SI.stride(0),
        slot_tables.floats_SF.stride(0),
        tiles.stride(0),
        PARTS=len(u_PTR),
        BLOCK_T=e.tile,
        BLOCK_R=site.padded_rank,
        BLOCK_N=e.columns,
        WALK=e.walk,
        EVEN_N=all(n % 16 == 0 for n in site.slice_sizes),
        OPERAND=operand(b_SRN),
        num_warps=e.warps,
        num_stages=e.stages,
    )
