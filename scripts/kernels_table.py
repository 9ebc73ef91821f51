"""Compiles the variants of the GPU kernels that serving can reach, for GPUs that are not there.

    python scripts/kernels_table.py            # write kernels/COMPILED.md; `make kernels-table`
    python scripts/kernels_table.py --page     # of what runs that were ended have found
    python scripts/kernels_table.py --here [--gpus 80,90] [--ranks 64] [--dtypes bf16] [--every]

Which variants there are is asked of the code that serves: the warm-up of an engine is run on
tensors without memory, for models of several shapes, and what Triton would compile for its launches
is kept. Of those that differ only in alignment, in how far a program walks and in the parts that it
sums, one with the most parts is compiled; `--every`: all. `--here` compiles with the Triton that is
installed and prints; without it each release of `TRITONS` is fetched into a folder of its own
(`--tritons`), and the table is written: kernels/compiled.json, and a page of it. Exit code 1 where
a variant does not compile, does not fit a multiprocessor, spills more than `MOST_SPILLED`, or has
the pattern that ptxas gets wrong (`tuning.py`).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from kernel_variants import ENGINES, GPUS, Variant, variants  # noqa: E402

PAGE, NUMBERS = ROOT / "kernels" / "COMPILED.md", ROOT / "kernels" / "compiled.json"
# Release of Triton → the torch that brings it.
TRITONS = {"3.6.0": "2.11", "3.7.1": "2.13", "3.8.0": "2.14"}
SOURCES = "sources"  # beside the capabilities
MOST_SPILLED = 4096  # bytes of a thread: with more, a kernel's numbers live in memory
# wgmma's accumulators, then its left operand in registers where shared memory has a descriptor.
FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{")
PIPELINED = re.compile(r"cp\.async(?!\.wait)")


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
    if spilled > MOST_SPILLED:
        return Compiled(registers, spilled, shared, f"{spilled} bytes spilled, of {MOST_SPILLED}")
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
    folders = ("kernels/gated_lora/backends/triton", "kernels/mix_mlp/backends/triton")
    files = sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))
    trees = [_without_docstrings(ast.parse(path.read_text())) for path in files]
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return tree


def _order(name: str) -> tuple[Any, ...]:
    """Numbers in a name count as numbers."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


# --- the table ------------------------------------------------------------------------------------

Tables = dict[str, dict[str, dict[str, Compiled]]]  # capability → release of Triton → name


def read_numbers() -> Tables:
    """What kernels/compiled.json has."""
    read = _read()
    read.pop(SOURCES, None)
    return {
        gpu: {t: {n: Compiled(*v) for n, v in numbers.items()} for t, numbers in table.items()}
        for gpu, table in read.items()
    }  # fmt: skip


def read_sources() -> dict[str, str]:
    """By capability, the digest (`sources`) of the kernels that its numbers are of."""
    found: dict[str, str] = _read().get(SOURCES, {})
    return found


def _read() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}
    return read


def write_numbers(tables: Tables, compiled_now: Iterable[str]) -> None:
    """kernels/compiled.json, and the page of it.

    Args:
        compiled_now: capabilities whose numbers are of the kernels as they are.
    """
    known = {**read_sources(), **dict.fromkeys(compiled_now, sources())}
    plain = {
        gpu: {t: {n: list(vars(by_name[n]).values()) for n in sorted(by_name, key=_order)}
              for t, by_name in tables[gpu].items()}
        for gpu in sorted(tables, key=int)
    }  # fmt: skip
    digests = {gpu: known[gpu] for gpu in sorted(known, key=int)}
    text = json.dumps({SOURCES: digests, **plain}, indent=1)
    text = re.sub(r"\[[^]]*\]", lambda found: " ".join(found[0].split()), text)  # one line each
    NUMBERS.write_text(text + "\n")
    PAGE.write_text(page(tables))


def page(tables: Mapping[str, Mapping[str, Mapping[str, Compiled]]]) -> str:
    """kernels/COMPILED.md."""
    brings = ", ".join(f"{triton} (torch {torch})" for triton, torch in TRITONS.items())
    parts = [INTRODUCTION.format(tritons=brings)]
    for capability in sorted(tables, key=int):
        table, (name, _, shared) = tables[capability], GPUS[capability]
        heads = ["kernel", "block sizes", "dtype", "warps", *table]
        rows = [heads, ["---"] * len(heads)]
        for variant in sorted({n for by_name in table.values() for n in by_name}, key=_order):
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
    """Compiles with every release, and writes what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = read_numbers()
    for gpu in gpus:
        if not only_page:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(lambda triton, gpu=gpu: elsewhere(triton, folder, gpu), TRITONS))
        names = {variant.name for variant in variants(gpu)}
        kept = {triton: read_kept(kept_in(folder, triton, gpu)) for triton in TRITONS}
        tables[gpu] = {t: {n: k[n] for n in names if n in k} for t, k in kept.items()}
        write_numbers(tables, [gpu])
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
    parser.add_argument("--ranks", help="only engines of these --max-lora-rank; with --dtypes any")
    parser.add_argument("--dtypes", help="only engines of these dtypes; with --ranks any")
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
    if ranks and dtypes:  # also such as the table does not have
        engines = [(rank, dtype) for rank in ranks for dtype in dtypes]
    found = {gpu: compile_all(gpu, engines, args.every, args.keep) for gpu in gpus}
    for gpu, by_name in found.items():
        for name, numbers in by_name.items():
            print(f"sm_{gpu} | {name} | {_cell(numbers)}")
    return int(any(c.wrong for by_name in found.values() for c in by_name.values()))


if __name__ == "__main__":
    sys.exit(main())
