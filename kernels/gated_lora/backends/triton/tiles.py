"""What the kernels that expand have in common beside the gates: rows of a tile, columns of y, and
activations."""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora import codes

SILU = tl.constexpr(codes.ACTIVATIONS.index("silu"))
GELU = tl.constexpr(codes.ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(codes.ACTIVATIONS.index("gelu_pytorch_tanh"))
QUICK_GELU = tl.constexpr(codes.ACTIVATIONS.index("quick_gelu"))


@triton.jit
def all_rows_of(
    tile,
    num_tiles,
    num_tokens,
    slots_ptr,
    order_ptr,
    tiles_ptr,
    stride_tiles,
    BLOCK_T: tl.constexpr,
):
    """As `names.rows_of`, of a kernel that writes all rows: tiles from `num_tiles` on are of those
    of the base model, in the order of the step."""
    of_base, has_slot = tile >= num_tiles, tile < num_tiles
    start = tl.load(tiles_ptr + stride_tiles + tile, mask=has_slot, other=0)
    stop = tl.load(tiles_ptr + 2 * stride_tiles + tile, mask=has_slot, other=0)
    start = tl.where(of_base, (tile - num_tiles) * BLOCK_T, start)
    stop = tl.where(of_base, num_tokens, stop)
    at_T = start + tl.arange(0, BLOCK_T)
    ok_T = at_T < stop
    in_order_T = at_T < tl.where(has_slot, stop, 0)
    token_T = tl.load(order_ptr + at_T, mask=in_order_T, other=0)
    token_T = tl.where(of_base, at_T, token_T).to(tl.int64)
    ok_T = ok_T & (token_T < num_tokens)  # the step may hold more rows than y has
    asked_T = ok_T & (at_T < tl.where(of_base, stop, 0))
    ok_T = ok_T & (tl.load(slots_ptr + token_T, mask=asked_T, other=-1) < 0)
    return start, stop, at_T, ok_T, token_T


@triton.jit
def columns(
    own_T,
    bias_ptr,
    has_bias,
    h_TR,
    open_R,
    b_R,
    scale_N,
    rescaled,
    width,
    ok_T,
    n_N,
    ok_N,
    OPERAND: tl.constexpr,
):
    """Some columns n of `own + bias + h B`, the first two rescaled if the slot says so, in fp32.

    Pointers are to the slice's first column; `scale_N` to its scale, and `width` on to its shift.
    B is read for the ranks that are open.
    """
    ok_TN = ok_T[:, None] & ok_N[None, :]
    y_TN = tl.load(own_T[:, None] + n_N[None, :], mask=ok_TN, other=0.0).to(tl.float32)
    if has_bias != 0:
        y_TN += tl.load(bias_ptr + n_N, mask=ok_N, other=0.0).to(tl.float32)[None, :]
    if rescaled != 0:
        y_TN *= tl.load(scale_N + n_N, mask=ok_N, other=1.0)[None, :]
        y_TN += tl.load(scale_N + width + n_N, mask=ok_N, other=0.0)[None, :]
    b_RN = tl.load(b_R[:, None] + n_N[None, :], mask=open_R[:, None] & ok_N[None, :], other=0.0)
    return y_TN + tl.dot(h_TR, b_RN.to(OPERAND), input_precision="tf32x3")


@triton.jit
def add(
    y_T,
    own_T,
    bias_ptr,
    has_bias,
    h_TR,
    b_R,
    scale_N,
    rescaled,
    width,
    ok_T,
    begin,
    end,
    size,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """`columns` from `begin` to `end`, into y."""
    open_R = tl.max((h_TR != 0).to(tl.int32), axis=0) != 0
    h_TR = h_TR.to(b_R.dtype.element_ty).to(OPERAND)
    for n in range(begin, end, BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        ok_N = n_N < size
        y_TN = columns(
            own_T, bias_ptr, has_bias, h_TR, open_R, b_R, scale_N, rescaled, width, ok_T, n_N, ok_N,
            OPERAND,
        )  # fmt: skip
        ok_TN = ok_T[:, None] & ok_N[None, :]
        tl.store(y_T[:, None] + n_N[None, :], y_TN.to(y_T.dtype.element_ty), mask=ok_TN)


@triton.jit
def activate(x, kind):
    if kind == SILU:
        x = x * tl.sigmoid(x)
    elif kind == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == GELU_TANH:  # (1 + tanh z) / 2 is sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif kind == QUICK_GELU:
        x = x * tl.sigmoid(1.702 * x)
    else:
        x = tl.maximum(x, 0.0)
    return x
