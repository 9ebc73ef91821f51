"""Takes in the parts of a bundle that `bundle.py` packed, on the machine that runs it.

    python3 unpack.py --work WORK [FOLDER ...]

FOLDER is a numbered folder or the one that holds them; by default the one this file lies in. Parts
may come one after the other: each is kept in WORK, and an archive is opened when all of its pieces
are there and right. Then `bash WORK/gpu.sh [STAGE ...]` runs the stages. Needs Python 3.11 and
nothing else.

Exit code: 0 all is there, 1 pieces are missing, 2 a piece is damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import shutil
import sys
import tarfile
from pathlib import Path

START = """#!/usr/bin/env bash
# The checks and measurements of a GPU, with what the bundle brought: see docs/gpu.md.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
[ -d /usr/local/cuda ] && export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
exec "${PYTHON:-python3}" -P "$here/checkout/scripts/gpu/run.py" --work "$here/run" "$@"
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(__file__).resolve().parent])
    args = parser.parse_args()
    return unpack(args.folders, args.work)


def unpack(folders: list[Path], work: Path) -> int:
    """Keeps every piece, and opens the archives that are complete."""
    parts = work / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for piece in (*folder.rglob("*.tar.xz.*"), *folder.rglob("PARTS")):
            shutil.copy(piece, parts / piece.name)
    archives: dict[str, list[tuple[str, str]]] = {}
    for line in (parts / "PARTS").read_text().splitlines():
        name, _, digest = line.split()
        archives.setdefault(Path(name).name.split(".")[0], []).append((Path(name).name, digest))
    codes = [open_archive(name, pieces, parts, work) for name, pieces in archives.items()]
    if not any(codes):
        (work / "gpu.sh").write_text(START)
        print(f"all is there: bash {work / 'gpu.sh'}")
    return max(codes)


def open_archive(name: str, pieces: list[tuple[str, str]], parts: Path, work: Path) -> int:
    """One archive into the folder of its name; an exit code as of `main`."""
    done, key = parts / f"{name}.done", " ".join(digest for _, digest in pieces)
    if done.exists() and done.read_text() == key:
        return 0
    missing = [piece for piece, _ in pieces if not (parts / piece).exists()]
    if missing:
        print(f"{name}: not here yet: {', '.join(missing)}")
        return 1
    data = [(parts / piece).read_bytes() for piece, _ in pieces]
    wrong = [p for (p, digest), b in zip(pieces, data, strict=True)
             if hashlib.sha256(b).hexdigest() != digest]  # fmt: skip
    if wrong:
        print(f"{name}: damaged: {', '.join(wrong)}")
        return 2
    where = work / name
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    with lzma.open(io.BytesIO(b"".join(data))) as file, tarfile.open(fileobj=file) as tar:
        tar.extractall(where, filter="tar")
    done.write_text(key)
    print(f"{name}: unpacked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
