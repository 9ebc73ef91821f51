"""The one launch behind a product with an extended weight (`gated_lora.extension`).

    y[t, n] = e[t, n] + bias[n] + sum_r B[slot(t), r, n] · factor[t, r] · g[t, r] · (A x)[t, r]

where e = x W^T has, in its first N columns, the layer's own output, and behind them `[A; router] x`
of every slot. e is fp32 and is not y: rows of the base model are copied too, by tiles of their own
behind those of the slots. So y is rounded once, and stands as a layer's output always does.

The rest is what `expand` does: one program takes a tile of rows and `WALK` columns of one slice.
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
    A_ROWS,
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
)
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import operand
from vllm_lora_ext.kernels.gated_lora.backends.triton.store import store_of
from vllm_lora_ext.kernels.gated_lora.backends.triton.tiles import add, all_rows_of
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import blocks, device_of
from vllm_lora_ext.kernels.gated_lora.step import max_tiles

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site


@triton.jit(
    do_not_specialize=[
        "has_bias", "num_tokens", "num_tiles", "max_rank", "width", "routers_at",
        "stride_router_part", "stride_slot", "stride_e", "stride_rows", "stride_ints",
        "stride_floats", "stride_tiles",
    ]
)  # fmt: skip
def extended_kernel(
    y_ptr,
    e_ptr,
    bias_ptr,
    has_bias,
    rows_ptr,
    b_ptr,
    ints_ptr,
    floats_ptr,
    columns_ptr,
    rescale_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    num_tokens,
    num_tiles,
    max_rank,
    width,
    routers_at,
    stride_router_part,
    stride_slot,
    stride_y,
    stride_e,
    stride_rows,
    stride_b_slot,
    stride_b,
    stride_ints,
    stride_floats,
    stride_tiles,
    ROUTER_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WALK: tl.constexpr,
    EVEN_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tl.program_id(2)
    has_slot = tile < num_tiles
    slot = tl.load(tiles_ptr + tile, mask=has_slot, other=0).to(tl.int64)
    if slot < 0:
        return
    part = tl.program_id(1)
    column = tl.load(columns_ptr + 2 * part)
    size = tl.load(columns_ptr + 2 * part + 1)
    if EVEN_N:  # then B and y are read and written 16 bytes at a time
        column, size = tl.multiple_of(column, 16), tl.multiple_of(size, 16)
        stride_e = tl.multiple_of(stride_e, 16)
    begin = tl.program_id(0) * WALK
    if begin >= size:
        return

    slot_ptr = ints_ptr + slot * stride_ints
    slice_ints = NUM_SLICE + RANK_INTS * max_rank + MAX_GATES * NUM_SPEC
    slice_floats = RANK_FLOATS * max_rank + MAX_GATES * NUM_VALUES
    slice_ptr = slot_ptr + COUNTS + part * slice_ints
    floats_ptr += slot * stride_floats + part * slice_floats
    # Of a slot without an adapter here, and of the base model, both are 0: y is e.
    ranks = tl.load(slice_ptr + RANKS, mask=has_slot, other=0)
    gates = tl.load(slice_ptr + GATES, mask=has_slot, other=0)
    rescaled = tl.load(slice_ptr + RESCALED, mask=has_slot, other=0)
    start, stop, at_T, ok_T, token_T = all_rows_of(
        tile, num_tiles, num_tokens, slots_ptr, order_ptr, tiles_ptr, stride_tiles, BLOCK_T
    )
    e_T = e_ptr + token_T * stride_e
    u_T = e_T + width + slot * stride_slot
    rows_T = rows_ptr + token_T * stride_rows
    shift = routers_at - tl.load(slot_ptr + A_ROWS)
    h_TR = gated(
        u_T, u_T, rows_T, slot_ptr, slice_ptr, floats_ptr, ranks, gates, at_T, ok_T, start, stop,
        max_rank, 0, shift, stride_router_part, 1, ROUTER_PARTS, BLOCK_R,
    )  # fmt: skip
    b_R = b_ptr + slot * stride_b_slot + tl.arange(0, BLOCK_R).to(tl.int64) * stride_b + column
    y_T = y_ptr + token_T * stride_y + column
    scale_N = tl.load(rescale_ptr).to(tl.pointer_type(tl.float32)) + slot * 2 * width + column
    end = tl.minimum(begin + WALK, size)
    add(
        y_T, e_T + column, bias_ptr + column, has_bias, h_TR, b_R, scale_N, rescaled, width, ok_T,
        begin, end, size, BLOCK_N, OPERAND,
    )  # fmt: skip


def expand_extended(
    y_TN: torch.Tensor, e_TE: torch.Tensor, bias_N: torch.Tensor | None, site: Site
) -> None:
    """Fills y from the product with the site's extended weight.

    Args:
        y_TN: [T, N], columns adjacent; fp32, fp16 or bf16, as the site's weights.
        e_TE: [T, `Extension.rows`] fp32, columns adjacent.
        bias_N: of the base layer.
    """
    own, slot_tables, b_SRN = site.extension, store_of(site).tables, store_of(site).b_SRN
    assert own is not None and y_TN.stride(1) == e_TE.stride(1) == 1
    num_tokens = len(y_TN)
    if not num_tokens:
        return
    device = device_of(y_TN.device.index)
    _, e = blocks(num_tokens, site.padded_rank, b_SRN.itemsize, device)
    tiles, rows_TC = site.step.tiles(e.tile), site.rows_TC
    num_tiles = max_tiles(num_tokens, len(b_SRN), e.tile)
    grid = (
        triton.cdiv(max(site.slice_sizes), e.walk),
        len(site.slice_sizes),
        num_tiles + triton.cdiv(num_tokens, e.tile),
    )
    extended_kernel[grid](
        y_TN,
        e_TE,
        y_TN if bias_N is None else bias_N,
        int(bias_N is not None),
        e_TE if rows_TC is None else rows_TC,
        b_SRN,
        slot_tables.ints_SI,
        slot_tables.floats_SF,
        slot_tables.columns_S2,
        store_of(site).rescale_1,
        site.step.token_slots_T,
        site.step.order_T,
        tiles,
        num_tokens,
        num_tiles,
        site.max_rank,
        b_SRN.shape[2],
        own.ranks,
        own.routers,
        own.slot_rows,
        y_TN.stride(0),
        e_TE.stride(0),
        0 if rows_TC is None else rows_TC.stride(0),
        b_SRN.stride(0),
        b_SRN.stride(1),
        slot_tables.ints_SI.stride(0),
        slot_tables.floats_SF.stride(0),
        tiles.stride(0),
        ROUTER_PARTS=own.parts,
        BLOCK_T=e.tile,
        BLOCK_R=site.padded_rank,
        BLOCK_N=e.columns,
        WALK=e.walk,
        EVEN_N=all(n % 16 == 0 for n in site.slice_sizes),
        OPERAND=operand(b_SRN),
        num_warps=e.warps,
        num_stages=e.stages,
    )
