"""Fuzz target: an adapter's folder one of whose files is anything at all.

    PYTHONPATH=tests python scripts/fuzz/folders.py CORPUS [libFuzzer's options]
    PYTHONPATH=tests python scripts/fuzz/folders.py --show INPUT
    PYTHONPATH=tests python scripts/fuzz/folders.py --merge SMALL CORPUS

The first byte of an input chooses a good folder, the second which of its files is replaced, the
rest is the file. Whatever it is, loading the folder gives an adapter or one `AdapterError` with a
code of docs/errors.md, within seconds, and takes no memory out of proportion.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import atheris
import torch  # noqa: F401 before the instrumentation: it is not what is tested

with atheris.instrument_imports(include=["vllm_lora_ext"]):
    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.errors import AdapterError

from changes import CODES, Memory, header_of, run, with_data
from make_formats import FORMATS, write_random

CONFIG, SIDECAR, WEIGHTS = "adapter_config.json", "routing.json", "adapter_model.safetensors"
HEADER = "header"  # of the weights, in front of as many bytes as it asks for
KINDS = (CONFIG, SIDECAR, HEADER, WEIGHTS, WEIGHTS + ".index.json")


@dataclass(frozen=True)
class Good:
    """A folder that loads, as its files are."""

    folder: Path
    files: dict[str, bytes]

    def seeds(self) -> dict[str, bytes]:
        """What each kind of input is before it is changed."""
        weights = self.files.get(WEIGHTS, b"")
        of = {kind: self.files[kind] for kind in KINDS if kind in self.files}
        return of | {HEADER: header_of(weights)} if weights else of


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
        self._memory = Memory()
        for one in self.good:
            self._check(one)
        self._memory = Memory()

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
        self._memory.check()


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
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        target = Target(Path(root))
        run(argv, target, lambda corpus: write_seeds(target, corpus))


if __name__ == "__main__":
    main(sys.argv)
