"""Makes CUDA libraries small: of their machine code only what one kind of GPU runs.

A library holds code for many kinds in *fat binaries*: a header, then entries of a header and code
each, machine code or PTX (from which the driver makes machine code). What other kinds run is taken
out, and zeros, which compress to nothing, are in its place; all else stays as and where it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC, PTX, CUBIN = 0xBA55ED50, 1, 2


class Entry(NamedTuple):
    """Where in the library an entry's header and code begin, and where it ends."""

    kind: int
    arch: int
    header: int
    code: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.header


def prune(path: Path, arch: int, wanted: Callable[[bytes], bool] = lambda _: True) -> None:
    """Leaves each fat binary with what a GPU of compute capability `arch` (90: 9.0) runs.

    Entries move to the front of their binary, whose header then says how long it is.

    Args:
        wanted: may refuse some of that code too.
    """
    whole = path.read_bytes()
    data, binaries = bytearray(whole), list(fat_binaries(whole))
    every = [entry for _, entries in binaries for entry in entries]
    for binary, entries in binaries:
        native = [e for e in entries if (e.kind, e.arch) == (CUBIN, arch)]
        kept = [e for e in native if wanted(whole[e.code : e.stop])]
        ptx = [e for e in entries if e.kind == PTX and e.arch <= arch]
        if not native and ptx:  # the driver compiles it: the newest
            kept = [max(ptx, key=lambda e: e.arch)]
        if not kept:  # never empty: something small, so that a launch fails and loading does not
            kept = [min(every if native else entries, key=lambda e: e.size)]
        first, stop = entries[0].header, entries[-1].stop
        code = b"".join(whole[e.header : e.stop] for e in kept)
        if len(code) > stop - first:  # what is small elsewhere may not fit here
            continue
        struct.pack_into("<Q", data, binary + 8, len(code))
        data[first:stop] = code + bytes(stop - first - len(code))
    path.write_bytes(data)


def fat_binaries(data: bytes) -> Iterator[tuple[int, list[Entry]]]:
    """Where each fat binary of a library starts, and its entries."""
    for start, size in _sections(data):
        at = start
        while at < start + size:
            magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
            if magic != MAGIC:
                at += 8
                continue
            binary, entries, at, stop = at, [], at + header, at + header + length
            while at < stop:
                kind, _, header, length = struct.unpack_from("<HHIQ", data, at)
                (arch,) = struct.unpack_from("<I", data, at + 28)
                entries.append(Entry(kind, arch, at, at + header, at + header + length))
                at += header + length
            at = (stop + 7) // 8 * 8
            if entries:
                yield binary, entries


def _sections(data: bytes) -> list[tuple[int, int]]:
    """(offset, size) of the ELF sections that hold fat binaries."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    width, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * width) for i in range(count)]
    found = []
    for header in headers:
        name = data[headers[names][4] + header[0] :].split(b"\0", 1)[0]
        if name == b".nv_fatbin":
            found.append((header[4], header[5]))
    return found
