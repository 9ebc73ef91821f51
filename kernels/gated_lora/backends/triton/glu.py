"""The second launch of a layer [gate | up] that activates too: what comes next reads `a`, not y.

    a[t, i] = act( gate[t, i] ) · up[t, i]       gate, up = y + B (g ⊙ A x), as `expand` has it

y is the layer's own output, or the product with its extended weight (`extended`); it stays as it
is. Rows of the base model are activated as well, by tiles of their own behind those of the slots:
a step without an adapter has no others. gate and up are not rounded before they are activated.

One program takes a tile of rows and `WALK` columns of a, with those of gate and up above them; the
gates of both slices are in registers at once.
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
from vllm_lora_ext.kernels.gated_lora.backends.triton.tiles import activate, all_rows_of, columns
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import activating, device_of
from vllm_lora_ext.kernels.gated_lora.codes import ACTIVATIONS
from vllm_lora_ext.kernels.gated_lora.step import max_tiles

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site


@triton.jit(
    do_not_specialize=[
        "kind", "has_bias", "num_tokens", "num_tiles", "max_rank", "routers_at",
        "stride_router_part", "stride_slot", "stride_u_part", "stride_u", "stride_rows",
        "stride_ints", "stride_floats", "stride_tiles",
    ]
)  # fmt: skip
def glu_kernel(
    a_ptr,
    y_ptr,
    u_ptr,
    bias_ptr,
    rows_ptr,
    b_ptr,
    ints_ptr,
    floats_ptr,
    rescale_ptr,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    kind,
    has_bias,
    num_tokens,
    num_tiles,
    inner,
    max_rank,
    routers_at,
    stride_router_part,
    stride_slot,
    stride_a,
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
    ROUTER_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WALK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tl.program_id(1)
    has_slot = tile < num_tiles
    slot = tl.load(tiles_ptr + tile, mask=has_slot, other=0).to(tl.int64)
    if slot < 0:
        return
    start, stop, at_T, ok_T, token_T = all_rows_of(
        tile, num_tiles, num_tokens, slots_ptr, order_ptr, tiles_ptr, stride_tiles, BLOCK_T
    )
    slot_ptr = ints_ptr + slot * stride_ints
    floats_ptr += slot * stride_floats
    gate_ptr = slot_ptr + COUNTS
    up_ptr = gate_ptr + NUM_SLICE + RANK_INTS * max_rank + MAX_GATES * NUM_SPEC
    up_floats_ptr = floats_ptr + RANK_FLOATS * max_rank + MAX_GATES * NUM_VALUES
    u_T = u_ptr + token_T * stride_u + slot * stride_slot
    rows_T = rows_ptr + token_T * stride_rows
    shift = routers_at - tl.load(slot_ptr + A_ROWS)
    gate_TR = gated(
        u_T, u_T, rows_T, slot_ptr, gate_ptr, floats_ptr,
        tl.load(gate_ptr + RANKS, mask=has_slot, other=0),
        tl.load(gate_ptr + GATES, mask=has_slot, other=0),
        at_T, ok_T, start, stop, max_rank, stride_u_part, shift, stride_router_part, PARTS,
        ROUTER_PARTS, BLOCK_R,
    )  # fmt: skip
    up_TR = gated(
        u_T, u_T, rows_T, slot_ptr, up_ptr, up_floats_ptr,
        tl.load(up_ptr + RANKS, mask=has_slot, other=0),
        tl.load(up_ptr + GATES, mask=has_slot, other=0),
        at_T, ok_T, start, stop, max_rank, stride_u_part, shift, stride_router_part, PARTS,
        ROUTER_PARTS, BLOCK_R,
    )  # fmt: skip
    b_R = b_ptr + slot * stride_b_slot + tl.arange(0, BLOCK_R).to(tl.int64) * stride_b
    scale_N = tl.load(rescale_ptr).to(tl.pointer_type(tl.float32)) + slot * 4 * inner
    gate_rescaled = tl.load(gate_ptr + RESCALED, mask=has_slot, other=0)
    up_rescaled = tl.load(up_ptr + RESCALED, mask=has_slot, other=0)
    gate_open_R = tl.max((gate_TR != 0).to(tl.int32), axis=0) != 0
    up_open_R = tl.max((up_TR != 0).to(tl.int32), axis=0) != 0
    gate_TR = gate_TR.to(b_ptr.dtype.element_ty).to(OPERAND)
    up_TR = up_TR.to(b_ptr.dtype.element_ty).to(OPERAND)
    y_T = y_ptr + token_T * stride_y
    a_T = a_ptr + token_T * stride_a
    begin = tl.program_id(0) * WALK
    for n in range(begin, tl.minimum(begin + WALK, inner), BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        ok_N = n_N < inner
        gate_TN = columns(
            y_T, bias_ptr, has_bias, gate_TR, gate_open_R, b_R, scale_N, gate_rescaled, 2 * inner,
            ok_T, n_N, ok_N, OPERAND,
        )  # fmt: skip
        up_TN = columns(
            y_T + inner, bias_ptr + inner, has_bias, up_TR, up_open_R, b_R + inner, scale_N + inner,
            up_rescaled, 2 * inner, ok_T, n_N, ok_N, OPERAND,
        )  # fmt: skip
        a_TN = (activate(gate_TN, kind) * up_TN).to(a_ptr.dtype.element_ty)
        tl.store(a_T[:, None] + n_N[None, :], a_TN, mask=ok_T[:, None] & ok_N[None, :])


def glu(
    a_TI: torch.Tensor,
    y_TN: torch.Tensor,
    u_PTR: torch.Tensor | None,
    site: Site,
    bias_N: torch.Tensor | None = None,
) -> None:
    """Fills a with `act(gate) · up` of a layer whose activation is `site.activation`.

    Args:
        a_TI: [T, I], columns adjacent, in the model's dtype.
        y_TN: [T, gate | up]; or, in fp32, the product with the site's extended weight.
        u_PTR: [parts, T, site.num_rows] fp32, from `shrink`; None: the step has no adapter, or what
            a shrink has stands in y.
        bias_N: what is still to be added to y.
    """
    num_tokens, inner = a_TI.shape
    if not num_tokens:
        return
    assert site.activation is not None and a_TI.stride(1) == y_TN.stride(1) == 1
    own = site.extension if y_TN.shape[1] > 2 * inner else None
    store = store_of(site)
    b_SRN, slot_tables, rows_TC = store.b_SRN, store.tables, site.rows_TC
    e = activating(num_tokens, site.padded_rank, b_SRN.itemsize, device_of(a_TI.device.index))
    tiles = site.step.tiles(e.tile)
    adapted = site.step.active and (u_PTR is not None or own is not None)
    num_tiles = max_tiles(num_tokens, len(b_SRN), e.tile) if adapted else 0
    if own is not None:
        u_PTR = y_TN[None, :, 2 * inner :]
    elif u_PTR is None:  # read by nobody
        u_PTR = slot_tables.floats_SF[None]
    grid = triton.cdiv(inner, e.walk), num_tiles + triton.cdiv(num_tokens, e.tile)
    glu_kernel[grid](
        a_TI,
        y_TN,
        u_PTR,
        a_TI if bias_N is None else bias_N,
        slot_tables.floats_SF if rows_TC is None else rows_TC,
        b_SRN,
        slot_tables.ints_SI,
        slot_tables.floats_SF,
        store.rescale_1,
        site.step.token_slots_T,
        site.step.order_T,
        tiles,
        ACTIVATIONS.index(site.activation),
        int(bias_N is not None),
        num_tokens,
        num_tiles,
        inner,
        site.max_rank,
        0 if own is None else own.ranks,
        0 if own is None else own.routers,
        0 if own is None else own.slot_rows,
        a_TI.stride(0),
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
        ROUTER_PARTS=0 if own is None else own.parts,
        BLOCK_T=e.tile,
        BLOCK_R=site.padded_rank,
        BLOCK_N=e.columns,
        WALK=e.walk,
        OPERAND=operand(b_SRN),
        num_warps=e.warps,
        num_stages=e.stages,
    )
