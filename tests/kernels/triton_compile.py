"""Compiles every block size of the tuning table for a GPU that need not be there.

    python tests/kernels/triton_compile.py 90 [--table]

Prints `kernel, shared bytes` for each; an error ends it. The interpreter takes much that the
compiler refuses, so machines without a GPU run both. `--table` takes more ranks, and prints
registers and spilled bytes as the table in `kernels/README.md` has them; a variant that does not
compile is a row of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import partial

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from vllm_lora_ext.kernels.gated_lora.backends.triton.expand import expand_kernel
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import shrink_kernel
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import (
    SYNCHRONOUS_ROWS,
    Device,
    Expand,
    Shrink,
    blocks,
    warps_of,
)
from vllm_lora_ext.kernels.mix_mlp.triton_mix import COLUMNS, TILE, mix_kernel

NAMES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
POINTERS = {
    "u_ptr": "fp32", "v_ptr": "fp32", "routers_ptr": "i64", "floats_ptr": "fp32", "ints_ptr": "i32",
    "order_ptr": "i32", "tiles_ptr": "i32", "columns_ptr": "i32", "z_ptr": "fp32",
    "block_ptr": "i32", "rows_ptr": "fp32",
}  # fmt: skip
ALIGNED = ("num_k", "stride_x", "stride_y", "stride_b", "stride_b_slot", "stride_a_slot",
           "inner", "stride_a", "stride_base", "stride_down",
           "stride_down_slot")  # fmt: skip
# wgmma's accumulators, then its left operand in registers where shared memory has a descriptor.
ASYNC_FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{")
# (tokens, ranks, dtype): decode and prefill of every dtype, and the largest rank.
CASES = (
    (8, 128, "bf16"), (300, 32, "bf16"), (8192, 64, "bf16"), (8192, 128, "bf16"),
    (8192, 16, "fp16"), (64, 16, "fp32"), (8192, 64, "fp32"),
)  # fmt: skip


LAST: dict = {}  # of the last kernel that was compiled


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
    compiled = triton.compile(source, target=target, options=options)
    LAST["ptx"], LAST["capability"] = compiled.asm["ptx"], target.arch
    pipelined = re.search(r"cp\.async(?!\.wait)", compiled.asm["ptx"])
    assert not (pipelined and ASYNC_FROM_REGISTERS.search(compiled.asm["ptx"])), (
        "ptxas may reuse the registers of an asynchronous product too early", constants, options,
    )  # fmt: skip
    return compiled.metadata.shared


def shrink(target: GPUTarget, s: Shrink, dtype: str, even: bool) -> int:
    return compile_for(
        target, shrink_kernel, dtype, {"num_warps": s.warps, "num_stages": s.stages},
        BLOCK_T=s.tile, BLOCK_R=s.rows, BLOCK_G=SYNCHRONOUS_ROWS, BLOCK_K=s.k,
        EVEN_K=even, OPERAND=NAMES[dtype],
    )  # fmt: skip


def expand(target: GPUTarget, e: Expand, ranks: int, dtype: str, parts: int) -> int:
    return compile_for(
        target, expand_kernel, dtype, {"num_warps": e.warps, "num_stages": e.stages},
        PARTS=parts, BLOCK_T=e.tile, BLOCK_R=ranks, BLOCK_N=e.columns, WALK=e.walk,
        EVEN_N=True, OPERAND=NAMES[dtype],
    )  # fmt: skip


def mix(target: GPUTarget, ranks: int, dtype: str, parts: int, gated: bool) -> int:
    options = {"num_warps": warps_of(TILE, ranks), "num_stages": 1}
    return compile_for(
        target, mix_kernel, dtype, options, PARTS=parts, GATED=gated,
        BLOCK_T=TILE, BLOCK_R=ranks, BLOCK_N=COLUMNS, OPERAND=NAMES[dtype],
    )  # fmt: skip


def usage() -> str:
    """Registers and spilled bytes of the last kernel, by Triton's own ptxas."""
    arch = LAST["capability"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(LAST["ptx"])
        file.flush()
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    return f"{registers[1] if registers else '?'} | {spilled[1] if spilled else 0}"


def table(capability: int, device: Device) -> None:
    target = GPUTarget("cuda", capability, 32)

    def row(name: str, warps: int, compile_it) -> None:
        try:
            shared = compile_it()
            print(f"| {name} | {warps} | {usage()} | {shared} |", flush=True)
        except Exception as error:
            print(f"| {name} | {warps} | {type(error).__name__} | | |", flush=True)

    print(f"Triton {triton.__version__}, sm_{capability}")
    for dtype in ("bf16", "fp32"):
        itemsize = NAMES[dtype].primitive_bitwidth // 8
        for tokens, parts in ((8, 8), (64, 8), (300, 2), (8192, 1)):
            s, _ = blocks(tokens, 64, itemsize, device, as_stored=dtype != "fp32")
            if dtype == "bf16" or tokens in (8, 8192):
                name = f"shrink {s.tile} x {s.rows} x {s.k} {dtype}"
                row(name, s.warps, partial(shrink, target, s, dtype, even=True))
            for ranks in (16, 64, 128, 256, 512):
                _, e = blocks(tokens, ranks, itemsize, device)
                if (dtype == "fp32" and ranks != 64) or tokens == 64:
                    continue
                name = f"expand {e.tile} x {ranks} x {e.columns} {dtype}, {parts} parts"
                row(name, e.warps, partial(expand, target, e, ranks, dtype, parts))
        for ranks in (16, 64, 128, 256, 512) if dtype == "bf16" else (64,):
            name = f"mix {TILE} x {ranks} x {COLUMNS} {dtype}"
            row(name, warps_of(TILE, ranks), partial(mix, target, ranks, dtype, 8, True))


def main() -> None:
    capability = int(sys.argv[1])
    shared = {80: 163, 89: 99, 90: 227, 100: 227}[capability] * 1024
    device = Device("no device", 100, shared)
    if "--table" in sys.argv:
        return table(capability, device)
    target = GPUTarget("cuda", capability, 32)
    for tokens, ranks, dtype in CASES:
        itemsize = NAMES[dtype].primitive_bitwidth // 8
        s, e = blocks(tokens, ranks, itemsize, device, as_stored=dtype != "fp32")
        parts = 8 if tokens <= 64 else 1
        used = {
            s: shrink(target, s, dtype, even=tokens > 8),
            e: expand(target, e, ranks, dtype, parts),
        }
        for block, size in used.items():
            print(dtype, ranks, block, size)
            assert size <= shared, (block, size, shared)
    for ranks, dtype, parts, gated in ((128, "bf16", 8, True), (16, "fp32", 1, False)):
        size = mix(target, ranks, dtype, parts, gated)
        print(dtype, ranks, "mix", size)
        assert size <= shared, size
    print("compiled")


if __name__ == "__main__":
    main()
