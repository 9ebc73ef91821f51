"""Compiles the variants of the GPU kernels that serving can reach, for GPUs that are not there.

    python scripts/kernels_table.py            # write kernels/COMPILED.md; `make kernels-table`
    python scripts/kernels_table.py --page     # of what runs that were ended have found
    python scripts/kernels_table.py --here [--gpus 80,90] [--ranks 64] [--dtypes bf16] [--every]

Which variants there are is asked of the code that serves: the warm-up of an engine is run on
tensors without memory, for models of several shapes, and what Triton would compile for its launches
is kept. Of those that differ only in alignment, in how far a program walks and in the parts that it
sums, one with the most parts is compiled; `--every`: all. `--here` compiles with the Triton that is
installed and prints; without it each release of `TRITONS` is fetched into a folder of its own
(`--tritons`), and the table is written. Exit code 1 where a variant does not compile, does not fit
a multiprocessor, or has the pattern that ptxas gets wrong (`tuning.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "kernels" / "COMPILED.md"
# Release of Triton → the torch that brings it.
TRITONS = {"3.6.0": "2.11", "3.7.1": "2.13", "3.8.0": "2.14"}
# Name, multiprocessors, KiB of shared memory that a program may have.
GPUS = {"90": ("H100", 132, 227), "100": ("B200", 148, 227), "80": ("A100", 108, 163)}
# (most ranks, dtype) of an engine: --max-lora-rank, and fp32 to see that it is no worse.
ENGINES = ((16, "bf16"), (64, "bf16"), (128, "bf16"), (512, "bf16"), (64, "fp32"))
# K, and N of the slices, of a decoder layer: Llama-3.1-8B, and sizes that no power of two divides.
LLAMA = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
ODD = ((2880, (4096, 512, 512)), (4096, (2880,)), (576, (1536, 1536)), (1530, (570,)))
MAX_TOKENS, SLOTS = 2048, 8  # of a step; more rows change no choice
# The first is the dtype; the others make no other kernel of it.
UNNAMED = ("OPERAND", "EVEN_K", "EVEN_N", "WALK", "PARTS")
# wgmma's accumulators, then its left operand in registers where shared memory has a descriptor.
FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{")
PIPELINED = re.compile(r"cp\.async(?!\.wait)")


@dataclass(frozen=True)
class Variant:
    """One thing that Triton compiles: a kernel's source with its types, constants and options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    @property
    def sizes(self) -> dict[str, Any]:
        """The constants by their names."""
        names = self.kernel.arg_names
        return {names[k[0]] if isinstance(k, tuple) else k: v for k, v in self.constants.items()}

    @property
    def name(self) -> str:
        """What the table calls it; several variants may have one name."""
        shown = [
            f"{name.removeprefix('BLOCK_')} {value}"
            for name, value in self.sizes.items()
            if name.isupper() and name not in UNNAMED
        ]
        kernel = self.kernel.__name__.removesuffix("_kernel")
        return f"{kernel} | {', '.join(shown)} | {self.sizes['OPERAND']} | {self.options.num_warps}"


class Kept:
    """In place of a kernel: keeps what Triton would compile for its launches."""

    def __init__(self, kernel: Any, target: Any) -> None:
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.kernel, self.backend = kernel, make_backend(target)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        self.found: dict[str, Variant] = {}

    def __getitem__(self, _grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            bound, specialization, options = self.bind(*args, **kwargs)
            key = f"{specialization} {options}"
            if key not in self.found:
                packed = self.kernel._pack_args(
                    self.backend, kwargs, bound, specialization, options
                )
                made, signature, constants, attributes = packed
                self.found[key] = Variant(self.kernel, signature, constants, attributes, made)

        return launch


def variants(capability: str, engines: Iterable[tuple[int, str]] = ENGINES) -> list[Variant]:
    """Every variant of a GPU's engines, by what their warm-up launches."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from vllm_lora_ext.kernels.gated_lora.backends.triton import expand, shrink, tuning, warmup
    from vllm_lora_ext.kernels.mix_mlp import triton_mix
    from vllm_lora_ext.kernels.mix_mlp import warmup as block_warmup

    name, processors, shared = GPUS[capability]
    device = tuning.Device(name, processors, shared * 1024)
    target = GPUTarget("cuda", int(capability), 32)
    kept, before = [], []
    for module in (shrink, expand, triton_mix, warmup, block_warmup):
        for key, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and key.endswith("_kernel"):
                kept.append(Kept(value, target))
                before.append((module, key, value))
                setattr(module, key, kept[-1])
            elif value is tuning.device_of:
                before.append((module, key, value))
                setattr(module, key, lambda _index: device)
    try:
        for rank, dtype in engines:
            for shapes in (LLAMA, ODD):
                _warm(shapes, rank, dtype)
    finally:
        for module, key, value in before:
            setattr(module, key, value)
    return [variant for kernel in kept for variant in kernel.found.values()]


def _warm(shapes: Any, rank: int, dtype: str) -> None:
    """What an engine does when it starts, without memory."""
    import torch

    from vllm_lora_ext.kernels.gated_lora import Site, StepMap
    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.kernels.gated_lora.backends.triton import warmup
    from vllm_lora_ext.kernels.mix_mlp import BlockSite
    from vllm_lora_ext.kernels.mix_mlp import warmup as block_warmup

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    step = StepMap(MAX_TOKENS, "meta", tiled=True)
    triton = choice.triton()
    sites = [Site(SLOTS, k, sizes, rank, rank, kind, "meta", triton) for k, sizes in shapes]
    for site in sites:
        site.step = step
    warmup.warm(sites, MAX_TOKENS, kind)
    blocks = [BlockSite(sites[2], sites[3], torch.relu, act_name="silu")]
    if sites[2].slice_sizes[0] == sites[3].a_SRK.shape[2]:
        block_warmup.warm(blocks, MAX_TOKENS, kind)


# --- compiling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a variant takes; `wrong` says why it cannot serve."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    wrong: str = ""


def compiled(variant: Variant, capability: str) -> Compiled:
    """Compiles one variant with the Triton that is imported."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", int(capability), 32)
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    try:
        made = triton.compile(source, target=target, options=variant.options.__dict__)
    except Exception as error:  # whatever a compiler says
        return Compiled(wrong=f"does not compile ({type(error).__name__})")
    ptx, shared = made.asm["ptx"], made.metadata.shared
    registers, spilled = _usage(ptx, capability)
    most = GPUS[capability][2] * 1024
    if shared > most:
        return Compiled(registers, spilled, shared, f"{shared} bytes shared, of {most}")
    if registers * 32 * variant.options.num_warps > 65536:
        return Compiled(registers, spilled, shared, "more registers than a multiprocessor has")
    if PIPELINED.search(ptx) and FROM_REGISTERS.search(ptx):
        return Compiled(registers, spilled, shared, "ptxas may reuse a product's registers")
    return Compiled(registers, spilled, shared)


def _usage(ptx: str, capability: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, by Triton's own ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = int(capability)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    return int(registers[1]) if registers else 0, int(spilled[1]) if spilled else 0


def worst(old: Compiled | None, new: Compiled) -> Compiled:
    """Of the variants of one name: the largest numbers, and the first thing that is wrong."""
    if old is None:
        return new
    return Compiled(
        max(old.registers, new.registers), max(old.spilled, new.spilled),
        max(old.shared, new.shared), old.wrong or new.wrong,
    )  # fmt: skip


def compile_all(
    capability: str, engines: Iterable[tuple[int, str]], every: bool, kept: Path | None
) -> dict[str, Compiled]:
    """By name, with the Triton that is imported.

    Args:
        kept: a file that gets the numbers as they come, and has those of an earlier run.
    """
    found = read_kept(kept)
    made = variants(capability, engines)
    before = set(found)
    for variant in sorted(made, key=lambda v: -v.sizes.get("PARTS", 1)):
        if variant.name in before or (variant.name in found and not every):
            continue
        new = compiled(variant, capability)
        found[variant.name] = worst(found.get(variant.name), new)
        if kept is not None:
            numbers = {name: list(vars(c).values()) for name, c in found.items()}
            kept.write_text(json.dumps({"sources": sources(), "numbers": numbers}))
    names = {variant.name for variant in made}
    return {name: found[name] for name in sorted(names, key=_order)}


def read_kept(path: Path | None) -> dict[str, Compiled]:
    """The numbers of an earlier run with the same kernels."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text())
    if kept["sources"] != sources():
        return {}
    return {name: Compiled(*values) for name, values in kept["numbers"].items()}


@cache
def sources() -> str:
    """Digest of all that is compiled."""
    folders = ("kernels/gated_lora/backends/triton", "kernels/mix_mlp")
    files = sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _order(name: str) -> tuple[Any, ...]:
    """Numbers in a name count as numbers."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


# --- the table ------------------------------------------------------------------------------------

Table = dict[str, dict[str, Compiled]]  # release of Triton → name → numbers


def page(tables: dict[str, Table], names: dict[str, list[str]]) -> str:
    """kernels/COMPILED.md from the tables of each compute capability, and its variants' names."""
    brings = ", ".join(f"{triton} (torch {torch})" for triton, torch in TRITONS.items())
    parts = [INTRODUCTION.format(tritons=brings)]
    for capability, table in tables.items():
        name, _, shared = GPUS[capability]
        heads = ["kernel", "block sizes", "dtype", "warps", *table]
        rows = [heads, ["---"] * len(heads)]
        for variant in names[capability]:
            cells = [_cell(by_name.get(variant)) for by_name in table.values()]
            rows.append([*variant.split(" | "), *cells])
        lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"## sm_{capability} ({name}, {shared * 1024} bytes shared)\n\n{lines}")
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Compiled variants of the GPU kernels

<!-- Written by `make kernels-table`. -->

What Triton makes of each kernel variant that serving can reach: registers of a thread / spilled
bytes of a thread / bytes of shared memory. By release of Triton: {tritons}. No GPU is needed.

Block sizes: T rows of x or y, R rows of A or ranks, G rows of routers, K or N columns in one step.
Variants that differ only in alignment, in how far a program walks and in how many parts of the
shrink it sums share a row; one with the most parts was compiled. An empty cell was not yet."""


def _cell(numbers: Compiled | None) -> str:
    if numbers is None:
        return ""
    if numbers.wrong:
        return f"**{numbers.wrong}**"
    return f"{numbers.registers} / {numbers.spilled} / {numbers.shared}"


def rows_of(text: str, capability: str) -> list[str]:
    """The names in a page's table of one compute capability."""
    _, _, rest = text.partition(f"## sm_{capability} ")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [" | ".join(line.strip("| ").split(" | ")[:4]) for line in lines[2:]]


def fetched(triton: str, folder: Path) -> Path:
    """The folder of a release of Triton, from the package index where it is not there yet."""
    where = folder / triton
    if not (where / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", where,
                   f"triton=={triton}"]  # fmt: skip
        subprocess.run([str(part) for part in command], check=True)
    return where


def elsewhere(triton: str, folder: Path, gpu: str) -> None:
    """Compiles with another release in a process of its own, which keeps the numbers."""
    env = {
        **os.environ, "PYTHONPATH": str(fetched(triton, folder)), "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_CACHE_DIR": str(folder / f"cache-{triton}"),
    }  # fmt: skip
    command = [sys.executable, "-P", "-W", "ignore", __file__, "--here", "--gpus", gpu,
               "--keep", kept_in(folder, triton, gpu)]  # fmt: skip
    subprocess.run([str(part) for part in command], env=env, check=False,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def kept_in(folder: Path, triton: str, gpu: str) -> Path:
    return folder / f"{triton}-sm_{gpu}.json"


def write(folder: Path, gpus: Sequence[str], only_page: bool) -> int:
    """Compiles with every release, and writes the page."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Table] = {}
    names: dict[str, list[str]] = {}
    for gpu in gpus:
        if not only_page:
            with ThreadPoolExecutor(len(TRITONS)) as pool:
                list(pool.map(lambda triton, gpu=gpu: elsewhere(triton, folder, gpu), TRITONS))
        names[gpu] = sorted({variant.name for variant in variants(gpu)}, key=_order)
        kept = {triton: read_kept(kept_in(folder, triton, gpu)) for triton in TRITONS}
        tables[gpu] = {t: {n: k[n] for n in names[gpu] if n in k} for t, k in kept.items()}
        PAGE.write_text(page(tables, names))
    wrong = [
        f"sm_{gpu}, Triton {triton}: {name}: {numbers.wrong}"
        for gpu, table in tables.items() for triton, by_name in table.items()
        for name, numbers in by_name.items() if numbers.wrong
    ]  # fmt: skip
    print("\n".join(wrong) or f"written: {PAGE.relative_to(ROOT)}")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--gpus", default=",".join(GPUS))
    parser.add_argument("--ranks", help="only engines of these --max-lora-rank")
    parser.add_argument("--dtypes", help="only engines of these dtypes")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--tritons", type=Path, default=Path(tempfile.gettempdir()) / "tritons")
    parser.add_argument("--page", action="store_true", help="write what earlier runs have found")
    parser.add_argument("--keep", type=Path, help="a file for the numbers, with --here and one GPU")
    args = parser.parse_args()
    gpus = args.gpus.split(",")
    if not args.here:
        return write(args.tritons, gpus, args.page)
    ranks = args.ranks and [int(rank) for rank in args.ranks.split(",")]
    dtypes = args.dtypes and args.dtypes.split(",")
    engines = [(rank, dtype) for rank, dtype in ENGINES
               if (not ranks or rank in ranks) and (not dtypes or dtype in dtypes)]  # fmt: skip
    found = {gpu: compile_all(gpu, engines, args.every, args.keep) for gpu in gpus}
    for gpu, by_name in found.items():
        for name, numbers in by_name.items():
            print(f"sm_{gpu} | {name} | {_cell(numbers)}")
    return int(any(c.wrong for by_name in found.values() for c in by_name.values()))


if __name__ == "__main__":
    sys.exit(main())
