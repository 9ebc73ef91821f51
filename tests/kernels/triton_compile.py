"""Compiles every block size of the tuning table for a GPU that need not be there.

    python tests/kernels/triton_compile.py 90

Prints `kernel, shared bytes` for each; an error ends it. The interpreter takes much that the
compiler refuses, so machines without a GPU run both.
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_lora_ext.kernels.gated_lora.triton_expand import expand_kernel
from vllm_lora_ext.kernels.gated_lora.triton_shrink import ROUTER_ROWS, shrink_kernel
from vllm_lora_ext.kernels.gated_lora.tuning import Device, Expand, Shrink, blocks

NAMES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
POINTERS = {
    "u_ptr": "fp32", "router_ptr": "fp32", "floats_ptr": "fp32", "ints_ptr": "i32",
    "order_ptr": "i32", "tiles_ptr": "i32", "columns_ptr": "i32",
}  # fmt: skip
ALIGNED = ("num_k", "stride_x", "stride_y", "stride_b", "stride_b_slot", "stride_a_slot",
           "stride_router_slot")  # fmt: skip
# (tokens, ranks, dtype): decode and prefill of every dtype, and the largest rank.
CASES = ((8, 128, "bf16"), (8192, 64, "bf16"), (8192, 16, "fp16"), (64, 16, "fp32"))


def compile_for(target: GPUTarget, kernel, dtype: str, options, **constants) -> int:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name, dtype)
        else:
            signature[name] = "i32"
    # What a launch finds for itself: pointers and strides of aligned tensors.
    aligned = [i for i, n in enumerate(kernel.arg_names) if n.endswith("_ptr") or n in ALIGNED]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options).metadata.shared


def shrink(target: GPUTarget, s: Shrink, dtype: str, parts: int, even: bool) -> int:
    return compile_for(
        target, shrink_kernel, dtype, {"num_warps": s.warps, "num_stages": s.stages},
        PARTS=parts, BLOCK_T=s.tile, BLOCK_R=s.rows, BLOCK_G=ROUTER_ROWS, BLOCK_K=s.k,
        EVEN_K=even, OPERAND=NAMES[dtype],
    )  # fmt: skip


def expand(target: GPUTarget, e: Expand, ranks: int, dtype: str, parts: int) -> int:
    return compile_for(
        target, expand_kernel, dtype, {"num_warps": e.warps, "num_stages": e.stages},
        PARTS=parts, BLOCK_T=e.tile, BLOCK_R=ranks, BLOCK_N=e.columns, WALK=e.walk,
        OPERAND=NAMES[dtype],
    )  # fmt: skip


def main() -> None:
    capability = int(sys.argv[1])
    shared = {80: 163, 89: 99, 90: 227}[capability] * 1024
    device = Device("no device", 100, shared)
    target = GPUTarget("cuda", capability, 32)
    for tokens, ranks, dtype in CASES:
        s, e = blocks(tokens, ranks, NAMES[dtype].primitive_bitwidth // 8, device)
        parts = 8 if tokens <= 64 else 1
        used = {
            s: shrink(target, s, dtype, parts, even=tokens > 8),
            e: expand(target, e, ranks, dtype, parts),
        }
        for block, size in used.items():
            print(dtype, ranks, block, size)
            assert size <= shared, (block, size, shared)
    print("compiled")


if __name__ == "__main__":
    main()
