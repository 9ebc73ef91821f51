"""Block sizes of the GPU kernels by shape and device, in one table.

Reasons behind the numbers (`kernels/README.md` has the cost model):

- decode is a question of latency. Tiles have 16 rows, the least a tensor core takes, and the
  shrink's K is split until about two programs stand on every multiprocessor; each program of the
  expand sums the splits again, so there are at most 8. One program of the expand adds one step of
  columns.
- prefill is a question of bytes of x and y. Tiles have 64 rows; the shrink takes 128 rows of A
  per pass over x; a program of the expand computes its gates once and walks over 1024 columns.

The expand holds h [tile, ranks] and B [ranks, columns] at once. `_columns` keeps both within the
shared memory of a multiprocessor, whatever the rank. Its gates live in registers, [tile, ranks]
too: `warps_of` gives a thread about 8 of these numbers, and 16 at most in tiles of 64 rows; ranks
that need more fall back to tiles of 16 rows. `kernels/README.md` has registers and spills.

Hopper's tensor cores take products of 64 rows and more asynchronously. Where the left operand of
one stands in registers, ptxas before 13.3 reuses these too early in a pipelined loop
(triton-lang/triton#9433), and results are wrong. So the expand, whose left operand is made in
registers, has one stage when its tiles have 64 rows, whatever the table says; and rows of A or of
routers that are converted on their way come 32 at a time. `scripts/kernels_table.py` looks
for the pattern in the compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Shrink:
    """tile: rows of x; rows: rows of A or of the routers; k: columns of x in one step."""

    tile: int
    rows: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Expand:
    """tile: rows of y; columns: of y in one step; walk: columns of y per program."""

    tile: int
    columns: int
    walk: int
    stages: int
    warps: int = 0  # by the rank


@dataclass(frozen=True)
class Row:
    """Block sizes for up to `max_tokens` rows in a step."""

    max_tokens: int
    shrink: Shrink
    expand: Expand


MAX_SPLITS = 8
SYNCHRONOUS_ROWS = 32  # of a left operand that is converted on its way; also holds most routers
LARGEST_GATES = 64 * 128  # [tile, ranks] of the gates
LARGEST = 1 << 30

# By a part of the device's name; "" is the fallback. First match wins, so is the first row that
# holds the step. `benchmarks/kernels/bench_gated_lora.py --sweep` prints what it finds best.
TABLE: dict[str, tuple[Row, ...]] = {
    "": (
        Row(16, Shrink(16, 32, 128, 4, 3), Expand(16, 64, 64, 1)),
        Row(64, Shrink(16, 32, 128, 4, 3), Expand(16, 128, 128, 1)),
        Row(512, Shrink(16, 64, 128, 4, 3), Expand(16, 128, 256, 2)),
        Row(LARGEST, Shrink(64, 128, 64, 8, 3), Expand(64, 128, 1024, 1)),
    ),
}


@dataclass(frozen=True)
class Device:
    """What the choice needs to know: its name, multiprocessors, and shared memory of one."""

    name: str
    processors: int
    shared_bytes: int


@cache
def device_of(index: int | None) -> Device:
    """A GPU by its number; None stands for the interpreter on a CPU."""
    if index is None:
        return Device("interpreter", 8, 228 * 1024)
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 99 * 1024)
    return Device(p.name, p.multi_processor_count, shared)


@cache
def blocks(
    num_tokens: int, ranks: int, itemsize: int, device: Device, as_stored: bool = True
) -> tuple[Shrink, Expand]:
    """Block sizes of both launches for a step of `num_tokens` rows.

    Args:
        ranks: most ranks per slice, rounded up to a power of two.
        itemsize: bytes of a weight.
        as_stored: whether the shrink multiplies A in the dtype that memory holds.
    """
    rows = next(rows for name, rows in TABLE.items() if name in device.name)
    row = next(row for row in rows if num_tokens <= row.max_tokens)
    s, e = row.shrink, row.expand
    a_rows = s.rows if as_stored else min(s.rows, SYNCHRONOUS_ROWS)
    s = Shrink(s.tile, a_rows, s.k * 2 // max(itemsize, 2), s.warps, s.stages)
    fits = e.tile * ranks <= LARGEST_GATES
    fits = fits and _columns(e.tile, ranks, itemsize, e.stages, device) >= 32
    tile = e.tile if fits else 16
    stages = 1 if tile > SYNCHRONOUS_ROWS else e.stages
    columns = min(e.columns, max(16, _columns(tile, ranks, itemsize, stages, device)))
    return s, Expand(tile, columns, max(e.walk, columns), stages, warps_of(tile, ranks))


def warps_of(tile: int, ranks: int) -> int:
    """Warps for gates of [tile, ranks] in registers.

    Triton 3.6 cannot compile the gates' search with 16 numbers a thread in tiles of 16 rows
    ("operand #0 does not dominate this use").
    """
    return min(32 if tile == 16 else 16, max(4, tile * ranks // 256))


def _columns(tile: int, ranks: int, itemsize: int, stages: int, device: Device) -> int:
    """Columns of B, a power of two, that fit beside h; at most 32 KiB of them at once."""
    free = min(device.shared_bytes - 4096 - tile * ranks * itemsize, stages * 32 * 1024)
    fit = max(free, 0) // (stages * ranks * itemsize)
    return 1 << (fit.bit_length() - 1) if fit else 0


@cache
def activating(num_tokens: int, ranks: int, itemsize: int, device: Device) -> Expand:
    """Of an expand that activates: the gates of two slices, and columns of both, are held at once.
    Arguments as for `blocks`."""
    _, e = blocks(num_tokens, ranks, itemsize, device)
    if e.tile > 16 and 2 * e.tile * ranks > LARGEST_GATES:
        _, e = blocks(1, ranks, itemsize, device)
        e = replace(e, walk=max(e.walk, 256))
    return replace(e, columns=max(16, e.columns // 2))


@cache
def splits(num_tokens: int, row_tiles: int, k: int, s: Shrink, device: Device) -> int:
    """Parts of K, a power of two: two programs per multiprocessor, each with work to do."""
    programs = max(1, row_tiles * -(-num_tokens // s.tile))
    wanted, most = 2 * device.processors // programs, min(MAX_SPLITS, -(-k // s.k))
    return 1 << max(0, min(wanted, most).bit_length() - 1)
