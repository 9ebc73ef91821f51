"""Weights on their way into L2 while a base product runs, beside it: nothing is computed.

What is read when the product is over: B of this site, of slots whose gates leave none of it unread,
and A and routers of the site that follows. Lines are asked for as the last ones that L2 gives up,
since the product's own weights pass through it meanwhile. The launch returns when everything is
asked for, not when it has come.

One program asks for `SECTORS` sectors of one slot's B, A or routers. Of a slot's tiles (`StepMap`)
only the first one does, and tiles without rows leave at once: captured graphs follow the step.
"""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora.backends.triton.names import A_ROWS, B_ROWS, ROUTER_ROWS
from vllm_lora_ext.kernels.gated_lora.backends.triton.store import store_of
from vllm_lora_ext.kernels.gated_lora.step import TILE_ROWS, max_tiles

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

SECTOR = 32  # bytes, the least that L2 takes in
SECTOR_BITS = tl.constexpr(8 * SECTOR)
SECTORS = 1024  # of one program


@triton.jit(
    do_not_specialize=[
        "width", "num_k", "b_chunks", "a_chunks", "stride_b_slot", "stride_a_slot", "stride_ints",
        "stride_after_ints",
    ]
)  # fmt: skip
def prefetch_kernel(
    b_ptr,
    ints_ptr,
    a_ptr,
    routers_ptr,
    after_ints_ptr,
    tiles_ptr,
    width,
    num_k,
    b_chunks,
    a_chunks,
    stride_b_slot,
    stride_a_slot,
    stride_ints,
    stride_after_ints,
    SECTORS: tl.constexpr,
    PTX: tl.constexpr,
):
    tile = tl.program_id(1)
    slot = tl.load(tiles_ptr + tile).to(tl.int64)
    if slot < 0:
        return
    if tl.load(tiles_ptr + tile - 1, mask=tile > 0, other=-1) == slot:
        return
    chunk = tl.program_id(0)
    if chunk < b_chunks:
        rows = tl.load(ints_ptr + slot * stride_ints + B_ROWS)
        _ask(b_ptr + slot * stride_b_slot, rows * width, chunk, SECTORS, PTX)
    elif chunk < b_chunks + a_chunks:
        rows = tl.load(after_ints_ptr + slot * stride_after_ints + A_ROWS)
        _ask(a_ptr + slot * stride_a_slot, rows * num_k, chunk - b_chunks, SECTORS, PTX)
    else:
        rows = tl.load(after_ints_ptr + slot * stride_after_ints + ROUTER_ROWS)
        if rows > 0:  # else they may have no memory
            router_ptr = tl.load(routers_ptr).to(tl.pointer_type(tl.float32))
            router_ptr += slot * tl.load(routers_ptr + 1)
            _ask(router_ptr, rows * num_k, chunk - b_chunks - a_chunks, SECTORS, PTX)


@triton.jit
def _ask(ptr, count, chunk, SECTORS: tl.constexpr, PTX: tl.constexpr):
    """Asks for one chunk of `count` numbers, by the first one of each sector."""
    step: tl.constexpr = SECTOR_BITS // ptr.dtype.element_ty.primitive_bitwidth
    at_S = (chunk * SECTORS + tl.arange(0, SECTORS)) * step
    ok_S = at_S < count
    if PTX:
        tl.inline_asm_elementwise(
            "{ .reg .pred ok; setp.ne.b32 ok, $2, 0;"
            " @ok prefetch.global.L2::evict_last [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [(ptr + at_S).to(tl.int64), ok_S.to(tl.int32)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:  # the interpreter knows no PTX; so it reads what would be asked for
        tl.load(ptr + at_S, mask=ok_S, other=0.0)


def prefetch(num_tokens: int, site: Site) -> None:
    """Asks for what is read when the site's product is over.

    Args:
        num_tokens: rows of the product.
    """
    if not num_tokens:
        return
    own, after = store_of(site), site.following or site
    b_SRN, a_SRK, theirs = own.b_SRN, after.a_SRK, store_of(after)
    (num_slots, ranks, width), (_, a_rows, num_k) = b_SRN.shape, a_SRK.shape
    tile = min(TILE_ROWS)
    sizes = [ranks * width * b_SRN.itemsize, 0, 0]  # of a slot
    if site.following is not None:
        router_bytes = after.most_routers * num_k * after.router_SGK.itemsize
        sizes[1:] = a_rows * num_k * a_SRK.itemsize, router_bytes
    b_chunks, a_chunks, router_chunks = (triton.cdiv(n, SECTOR * SECTORS) for n in sizes)
    grid = b_chunks + a_chunks + router_chunks, max_tiles(num_tokens, num_slots, tile)
    prefetch_kernel[grid](
        b_SRN,
        own.tables.ints_SI,
        a_SRK,
        theirs.routers_2,
        theirs.tables.ints_SI,
        site.step.tiles(tile),
        width,
        num_k,
        b_chunks,
        a_chunks,
        b_SRN.stride(0),
        a_SRK.stride(0),
        own.tables.ints_SI.stride(0),
        theirs.tables.ints_SI.stride(0),
        SECTORS=SECTORS,
        PTX=b_SRN.device.type != "cpu",
        num_warps=4,
    )
