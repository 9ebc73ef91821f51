"""First launch: `u = [A; router] x` of each row's own slot, in fp32.

    u[t, r] = sum_k rows[slot(t), r, k] * x[t, k]

Column r of u is row r of the slot's stack: A of every slice of the layer, then their routers and
threshold heads; after these, where a router reads a normalised x, the sum of x and of its squares.
A has the model's dtype; routers are fp32, and their products are made of three TF32 ones each, so
that logits are those of fp32 weights: rounding a router to bf16 changes the chosen experts of about
one token in a hundred.

One program multiplies one tile of rows of one slot (`StepMap`) with `BLOCK_R` rows of A or
`BLOCK_G` of the routers, over one part of K. The parts land side by side in `u[part]` and are
summed in a fixed order by whoever reads u: no atomics, so equal runs give equal bits.

The product is taken as `rows x^T`: its left operand then comes straight from memory. Hopper's
asynchronous products (64 rows and more) may also take it from registers, which ptxas before 13.3
reuses too early in a pipelined loop (triton-lang/triton#9433). Operands that are converted on their
way, the routers' among them, therefore have fewer rows (`tuning.SYNCHRONOUS_ROWS`).
"""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora.backends.triton.names import (
    A_ROWS,
    READS_NORM,
    ROUTER_ROWS,
    rows_of,
)
from vllm_lora_ext.kernels.gated_lora.backends.triton.store import store_of
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import (
    SYNCHRONOUS_ROWS,
    Shrink,
    blocks,
    device_of,
    splits,
)
from vllm_lora_ext.kernels.gated_lora.step import max_tiles

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

OPERANDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# Numbers that change from step to step must not be compiled for (1, multiples of 16), nor those
# that help no load of many bytes: each would make variants of the kernel (`warmup`).
@triton.jit(
    do_not_specialize=[
        "num_tokens", "parts", "a_tiles", "stride_u_part", "stride_u", "stride_ints",
        "stride_tiles",
    ]
)  # fmt: skip
def shrink_kernel(
    u_ptr,
    x_ptr,
    a_ptr,
    routers_ptr,
    ints_ptr,
    order_ptr,
    tiles_ptr,
    num_tokens,
    num_k,
    parts,
    a_tiles,
    stride_u_part,
    stride_u,
    stride_x,
    stride_a_slot,
    stride_ints,
    stride_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    part = tl.program_id(0) % parts
    row_tile = tl.program_id(0) // parts
    num_a = tl.load(ints_ptr + slot * stride_ints + A_ROWS)
    num_routers = tl.load(ints_ptr + slot * stride_ints + ROUTER_ROWS)
    _, _, _, ok_T, token_T = rows_of(tile, tiles_ptr, order_ptr, stride_tiles, num_tokens, BLOCK_T)
    x_T = x_ptr + token_T * stride_x
    u_T = u_ptr + part.to(tl.int64) * stride_u_part + token_T * stride_u
    length = tl.cdiv(num_k, parts * BLOCK_K) * BLOCK_K
    begin = part * length
    end = tl.minimum(begin + length, num_k)
    if row_tile == a_tiles:  # noqa: SIM102 - nobody else needs to load that
        if tl.load(ints_ptr + slot * stride_ints + READS_NORM) != 0:
            _stats(u_T + num_a + num_routers, x_T, ok_T, begin, end, num_k,
                   BLOCK_T, BLOCK_K, EVEN_K)  # fmt: skip
    if row_tile < a_tiles:
        first = row_tile * BLOCK_R
        if first < num_a:
            a_R = a_ptr + slot * stride_a_slot + first.to(tl.int64) * num_k
            _rows(u_T + first, x_T, a_R, ok_T, num_a - first, begin, end, num_k,
                  BLOCK_T, BLOCK_R, BLOCK_K, EVEN_K, OPERAND)  # fmt: skip
    else:
        first = (row_tile - a_tiles) * BLOCK_G
        if first < num_routers:
            router_ptr = tl.load(routers_ptr).to(tl.pointer_type(tl.float32))
            router_ptr = tl.multiple_of(router_ptr, 16)
            router_G = router_ptr + slot * tl.load(routers_ptr + 1) + first.to(tl.int64) * num_k
            _rows(u_T + num_a + first, x_T, router_G, ok_T, num_routers - first, begin, end, num_k,
                  BLOCK_T, BLOCK_G, BLOCK_K, EVEN_K, tl.float32)  # fmt: skip


@triton.jit
def _rows(
    u_T,
    x_T,
    w,
    ok_T,
    num_rows,
    begin,
    end,
    num_k,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """u^T = w x^T over k in [begin, end), from pointers to the rows of u and x."""
    row_R = tl.arange(0, BLOCK_R)
    ok_R = row_R < num_rows
    w_R = w + row_R.to(tl.int64) * num_k
    u_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for k in range(begin, end, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        ok_TK, ok_RK = ok_T[:, None], ok_R[:, None]
        if not EVEN_K:
            ok_TK = ok_TK & (k_K < num_k)[None, :]
            ok_RK = ok_RK & (k_K < num_k)[None, :]
        x_TK = tl.load(x_T[:, None] + k_K[None, :], mask=ok_TK, other=0.0).to(OPERAND)
        w_RK = tl.load(w_R[:, None] + k_K[None, :], mask=ok_RK, other=0.0).to(OPERAND)
        u_RT = tl.dot(w_RK, tl.trans(x_TK), u_RT, input_precision="tf32x3")
    tl.store(u_T[None, :] + row_R[:, None], u_RT, mask=ok_T[None, :] & ok_R[:, None])


@triton.jit
def _stats(
    u_T,
    x_T,
    ok_T,
    begin,
    end,
    num_k,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The sum of x over k in [begin, end), and of its squares, side by side."""
    sum_T = tl.zeros((BLOCK_T,), tl.float32)
    squares_T = tl.zeros((BLOCK_T,), tl.float32)
    k = begin
    while k < end:
        k_K = k + tl.arange(0, BLOCK_K)
        ok_TK = ok_T[:, None]
        if not EVEN_K:
            ok_TK = ok_TK & (k_K < num_k)[None, :]
        x_TK = tl.load(x_T[:, None] + k_K[None, :], mask=ok_TK, other=0.0).to(tl.float32)
        sum_T += tl.sum(x_TK, axis=1)
        squares_T += tl.sum(x_TK * x_TK, axis=1)
        k += BLOCK_K
    tl.store(u_T, sum_T, mask=ok_T)
    tl.store(u_T + 1, squares_T, mask=ok_T)


def shrink(x_TK: torch.Tensor, site: Site, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Parts of `[A; router] x` for each row's own slot.

    Args:
        x_TK: [T, K], any strides; fp32, fp16 or bf16, as the site's weights.
        memory: where to put them, as `parts_in` lays them out; what no program writes stays.
    Returns:
        [parts, T, site.num_rows] fp32, to be summed over the parts. What no program writes (rows
        of the base model, columns past a slot's rows) is undefined.
    """
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    num_tokens = len(x_TK)
    if memory is not None:
        u_PTR = parts_in(memory, x_TK, site)
    else:
        parts = num_parts(num_tokens, x_TK.dtype, site)
        u_PTR = x_TK.new_empty(parts, num_tokens, site.num_rows, dtype=torch.float32)
    if num_tokens:
        _launch(u_PTR, x_TK, site)
    return u_PTR


def parts_in(memory: torch.Tensor, x_TK: torch.Tensor, site: Site) -> torch.Tensor:
    """The shrink's result for x in memory that was made before: [parts, T, site.num_rows].

    Args:
        memory: fp32, flat, of at least `parts_size` numbers.
    """
    shape = num_parts(len(x_TK), x_TK.dtype, site), len(x_TK), site.num_rows
    return memory[: shape[0] * shape[1] * shape[2]].view(shape)


def parts_size(max_tokens: int, dtype: torch.dtype, site: Site) -> int:
    """Most numbers that the shrink of up to `max_tokens` rows of x in `dtype` has as its result."""
    most = (num_parts(t, dtype, site) * t for t in (*range(16, max_tokens, 16), max_tokens))
    return max(most) * site.num_rows


def num_parts(num_tokens: int, dtype: torch.dtype, site: Site) -> int:
    """Parts of K for a step of `num_tokens` rows of x in `dtype`."""
    s, _, row_tiles = _tiles(num_tokens, dtype, site)
    device = device_of(site.a_SRK.device.index)
    return splits(num_tokens, row_tiles, site.a_SRK.shape[2], s, device)


def _tiles(num_tokens: int, dtype: torch.dtype, site: Site) -> tuple[Shrink, int, int]:
    """Block sizes, tiles of A's rows, and these with the tiles of the routers' rows."""
    as_stored = dtype == site.a_SRK.dtype != torch.float32
    device = device_of(site.a_SRK.device.index)
    s, _ = blocks(num_tokens, site.padded_rank, site.a_SRK.itemsize, device, as_stored)
    a_tiles = triton.cdiv(len(site.slice_sizes) * site.max_rank, s.rows)
    return s, a_tiles, a_tiles + triton.cdiv(site.most_routers, SYNCHRONOUS_ROWS)


def _launch(u_PTR: torch.Tensor, x_TK: torch.Tensor, site: Site) -> None:
    store = store_of(site)
    parts, num_tokens, _ = u_PTR.shape
    s, a_tiles, row_tiles = _tiles(num_tokens, x_TK.dtype, site)
    num_slots, _, num_k = site.a_SRK.shape
    tiles = site.step.tiles(s.tile)
    shrink_kernel[(row_tiles * parts, max_tiles(num_tokens, num_slots, s.tile))](
        u_PTR,
        x_TK,
        site.a_SRK,
        store.routers_2,
        store.tables.ints_SI,
        site.step.order_T,
        tiles,
        num_tokens,
        num_k,
        parts,
        a_tiles,
        u_PTR.stride(0),
        u_PTR.stride(1),
        x_TK.stride(0),
        site.a_SRK.stride(0),
        store.tables.ints_SI.stride(0),
        tiles.stride(0),
        BLOCK_T=s.tile,
        BLOCK_R=s.rows,
        BLOCK_G=SYNCHRONOUS_ROWS,
        BLOCK_K=s.k,
        EVEN_K=num_k % s.k == 0,  # parts are of whole steps
        OPERAND=operand(x_TK),
        num_warps=s.warps,
        num_stages=s.stages,
    )


def operand(x: torch.Tensor) -> tl.dtype:
    """What a product takes its operands in; the interpreter cannot multiply bf16."""
    return tl.float32 if x.device.type == "cpu" else OPERANDS[x.dtype]
