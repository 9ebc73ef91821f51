"""Fuzz target: an adapter's folder one of whose files is anything at all.

    PYTHONPATH=tests python scripts/fuzz/folders.py CORPUS [libFuzzer's options]
    PYTHONPATH=tests python scripts/fuzz/folders.py --show INPUT

The first byte of an input chooses a good folder, the second which of its files is replaced, the
rest is the file. Whatever it is, loading the folder gives an adapter or one `AdapterError` with a
code of docs/errors.md, within seconds, and takes no memory out of proportion.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atheris
import torch  # noqa: F401 before the instrumentation: it is not what is tested

with atheris.instrument_imports(include=["vllm_lora_ext"]):
    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.errors import AdapterError

from make_formats import FORMATS, write_random

ROOT = Path(__file__).parents[2]
CODES = set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))
CONFIG, SIDECAR, WEIGHTS = "adapter_config.json", "routing.json", "adapter_model.safetensors"
HEADER = "header"  # of the weights, in front of as many bytes as it asks for
KINDS = (CONFIG, SIDECAR, HEADER, WEIGHTS, WEIGHTS + ".index.json")
MOST_DATA = 1 << 20
MOST_MEMORY_KIB = 512 << 10  # more than before, for files of some KiB
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 8, 0.5, -0.5, 1e300, -1e300, 2**31, 2**63, 2**70, "", "x",
    "8", "LORA", "ROUTED_LORA", "router", "top_k", "\ud800", "../x", "[", "(a+)+$", [], [None],
    [2, 2], [[1]], {}, {"a": 1}, {"default": {}}, [10**6] * 3, ["q_proj"], "F32", "F8_E8M0", "I64",
)  # fmt: skip


@dataclass(frozen=True)
class Good:
    """A folder that loads, as its files are."""

    folder: Path
    files: dict[str, bytes]

    def seeds(self) -> dict[str, bytes]:
        """What each kind of input is before it is changed."""
        weights = self.files.get(WEIGHTS, b"")
        length = int.from_bytes(weights[:8], "little")
        of = {kind: self.files[kind] for kind in KINDS if kind in self.files}
        return of | {HEADER: weights[8 : 8 + length]} if weights else of


def good_folders(root: Path) -> list[Good]:
    """A small one of every format that is one folder."""
    found = []
    for name in sorted(FORMATS):
        folder = write_random(name, root / name, 0, small=True)
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        found.append(Good(folder, files))
    return found


class Target:
    """What the fuzzer calls."""

    def __init__(self, root: Path) -> None:
        self.good = good_folders(root)
        for one in self.good:
            self._check(one)
        self._most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MOST_MEMORY_KIB

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        one, kind = self.good[data[0] % len(self.good)], KINDS[data[1] % len(KINDS)]
        name = WEIGHTS if kind == HEADER else kind
        content = with_data(data[2:], one.files.get(WEIGHTS, b"")) if kind == HEADER else data[2:]
        place = one.folder / name
        place.write_bytes(content)
        os.utime(place, (0, 0))  # nobody is writing to it now: it is not waited for
        try:
            self._check(one)
        finally:
            if name in one.files:
                place.write_bytes(one.files[name])
                os.utime(place, (0, 0))
            else:
                place.unlink()

    def _check(self, one: Good) -> None:
        try:
            load_adapter(one.folder)
        except AdapterError as error:
            assert error.code in CODES, error.code
            assert len(str(error)) < 1 << 16, "an error as long as what is wrong"
        if hasattr(self, "_most"):
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert used < self._most, f"{used - self._most + MOST_MEMORY_KIB} KiB for one folder"


def with_data(header: bytes, weights: bytes) -> bytes:
    """A safetensors file of a header: its length, and data up to where the header says it ends."""
    data = weights[8 + int.from_bytes(weights[:8], "little") :]
    try:
        ends = [entry["data_offsets"][1] for entry in json.loads(header).values()
                if isinstance(entry, dict) and "data_offsets" in entry]  # fmt: skip
        end = max([int(end) for end in ends], default=0)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError):
        end = len(data)
    end = end if 0 <= end <= MOST_DATA else len(data)
    return len(header).to_bytes(8, "little") + header + data[:end].ljust(end, b"\0")


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Changes the JSON as JSON mostly, and its bytes sometimes."""
    rng = random.Random(seed)
    try:
        value = json.loads(data[2:])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or rng.random() < 0.2:
        changed: bytes = atheris.Mutate(data, len(data))
        return changed[:most]
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    return (data[:2] + text)[:most]


def _change(value: dict[str, Any], rng: random.Random) -> None:
    """One key of an object, however deep: gone, another, twice, or of another value."""
    inner: Any = value
    while isinstance(inner, dict) and inner:
        key = rng.choice(list(inner))
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.6:
            inner = inner[key]
            continue
        match rng.randrange(5):
            case 0:
                del inner[key]
            case 1:
                inner[rng.choice((key + "x", key.replace("A", "B"), "", "r", "\ud800"))] = (
                    inner.pop(key)
                )
            case 2:
                again = rng.choice((key + ".0", key.replace("0", "1")))
                inner[again] = copy.deepcopy(inner[key])
            case _:
                inner[key] = copy.deepcopy(rng.choice(JUNK))
        return
    if isinstance(inner, list):
        at = rng.randrange(len(inner))
        inner[at : at + rng.randrange(2)] = copy.deepcopy([rng.choice(JUNK)] * rng.randrange(3))


def write_seeds(target: Target, corpus: Path) -> None:
    """What the fuzzer begins with."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(target.good):
        for kind, content in one.seeds().items():
            if len(content) < 1 << 14:
                seed = bytes([number, KINDS.index(kind)]) + content
                (corpus / f"{one.folder.name}-{kind}").write_bytes(seed)


def main(argv: list[str]) -> None:
    """Fuzzes until libFuzzer's options say stop."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        target = Target(root)
        if argv[1] == "--show":
            target(Path(argv[2]).read_bytes())
            return
        write_seeds(target, Path(argv[1]))
        atheris.Setup([argv[0], argv[1], *argv[2:]], target, custom_mutator=mutate)
        atheris.Fuzz()
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv)
