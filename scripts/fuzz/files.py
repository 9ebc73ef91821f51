"""Fuzz target: the files of our own beside adapters and recipes, one of which is anything at all.

    PYTHONPATH=tests python scripts/fuzz/files.py CORPUS [libFuzzer's options]
    PYTHONPATH=tests python scripts/fuzz/files.py --show INPUT
    PYTHONPATH=tests python scripts/fuzz/files.py --merge SMALL CORPUS

The first byte of an input chooses which file the rest is: a trace, the examples or an adapter of
LoRA Soups, an expert of a bundle or the routers over the experts, the index of a checkpoint, the
library of SG-LoRA, the layout of ICM-LoRA, the lock of a store. Whatever it is, its reader gives
what it is for or one `AdapterError` with a code of docs/errors.md, within seconds, and takes no
memory out of proportion; a trace that was read and written is the same.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import torch
from safetensors.torch import save_file

with atheris.instrument_imports(include=["vllm_lora_ext"]):
    from vllm_lora_ext.bundle import bundle, read_expert, read_router
    from vllm_lora_ext.errors import AdapterError
    from vllm_lora_ext.merging import save_peft
    from vllm_lora_ext.merging.generate.icm import read_layout
    from vllm_lora_ext.merging.generate.sg_lora import ExpertLibrary
    from vllm_lora_ext.merging.recipes import parse_recipe
    from vllm_lora_ext.merging.recipes.lock import LOCK
    from vllm_lora_ext.merging.recipes.store import Store
    from vllm_lora_ext.merging.soups.files import read_examples, save_soups, soup_folders
    from vllm_lora_ext.merging.soups.load import load_soups
    from vllm_lora_ext.merging.variants.files import INDEX, Checkpoint
    from vllm_lora_ext.trace import Trace

from changes import CODES, Memory, header_of, run, with_data
from merging.random_factors import random_factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ("trace.json", "examples.jsonl", f"run/adapter_1/{CONFIG}", f"run/adapter_1/{WEIGHTS}",
         f"b/{CONFIG}", "routers.safetensors", f"base/{INDEX}", "library/library.json",
         "library/embeddings.safetensors", "layout.json", LOCK)  # fmt: skip
GATES = (
    {"score": "softmax", "select": "top_k", "k": 1, "weight": "renormalise"},
    {"score": "sigmoid", "select": "threshold", "threshold": 0.5},
    {"score": "identity", "select": "top_p", "p": 0.9, "bias": True}, {},
)  # fmt: skip


class Target:
    """What the fuzzer calls."""

    def __init__(self, root: Path) -> None:
        self._root = root
        models = [{"model": "a"}, {"model": "b"}]
        self._recipe = parse_recipe({"version": 1, "merge_method": "cat", "models": models})
        self._write_good()
        self.good = {name: (root / name).read_bytes() for name in NAMES if name != LOCK}
        self.good[LOCK] = self._lock.read_bytes()
        self._read: dict[str, Callable[[int], None]] = dict(zip(NAMES, (
            self._trace, self._examples, self._soups, self._soups, self._bundle, self._bundle,
            self._checkpoint, self._library, self._library, self._layout, self._store,
        ), strict=True))  # fmt: skip
        self._memory = Memory()
        for name in NAMES:
            self._read[name](0)  # what is good is read

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        name = NAMES[data[0] % len(NAMES)]
        good = self.good[name]
        place = self._lock if name == LOCK else self._root / name
        header = name.endswith(".safetensors") and data[1] & 64
        place.write_bytes(with_data(data[2:], good) if header else data[2:])
        os.utime(place, (0, 0))  # nobody is writing to it now: it is not waited for
        try:
            self._read[name](data[1])
        except AdapterError as error:
            assert error.code in CODES, error.code
            assert len(str(error)) < 1 << 16, "an error as long as what is wrong"
            str(error).encode()
        finally:
            place.write_bytes(good)
            os.utime(place, (0, 0))
        self._memory.check()

    def _write_good(self) -> None:
        root = self._root
        for seed, name in enumerate(("a", "b")):
            save_peft(random_factors(seed, 2), root / name)
        modules = sorted(random_factors(0, 2).modules)
        save_soups([root / "a", root / "b"], [dict.fromkeys(modules, s) for s in (0.0, 1.0)],
                   root / "run")  # fmt: skip
        save_file({f"{name}.router.weight": torch.ones(2, random_factors(0, 2).modules[name]
                   .a_RK.shape[1]) for name in modules}, root / "routers.safetensors")  # fmt: skip
        (root / "base").mkdir()
        save_file({"x.weight": torch.ones(2, 3)}, root / "base/one.safetensors")
        (root / "base" / INDEX).write_text('{"weight_map": {"x.weight": "one.safetensors"}}')
        ExpertLibrary.build(
            {name: (name, f"about {name}") for name in "ab"}, lambda text: torch.ones(3)
        ).save(root / "library")
        entry = {"mean": 0.5, "std": 1.0, "length": 6, "shape": [2, 3]}
        (root / "layout.json").write_text(json.dumps({"x": entry}))
        rows = {"up_proj": torch.tensor([[0.5, 0.5, 0], [float("nan")] * 3, [1, 0, 0]])}
        trace = Trace([1, 2, -1], rows, 2, "a", "mola", "tiny", ["x", "y", "z"])
        (root / "trace.json").write_text(trace.to_json())
        lines = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "a", "completion": "b"}]
        (root / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        self._stored = Store(root / "store", 1 << 30)
        self._lock = self._stored.get_or_build(self._recipe, root.joinpath).path / LOCK

    def _trace(self, choice: int) -> None:
        text = (self._root / "trace.json").read_bytes().decode("utf-8", "surrogateescape")
        trace = Trace.from_json(text)
        again = Trace.from_json(trace.to_json())
        assert again.token_ids == trace.token_ids and again.tokens == trace.tokens
        for name, weight_TE in trace.weights.items():
            assert torch.equal(again.weights[name].nan_to_num(7.5), weight_TE.nan_to_num(7.5)), name
        Trace.merged([trace, again]).usage()

    def _examples(self, choice: int) -> None:
        for pair in read_examples(self._root / "examples.jsonl"):
            assert all(pair)

    def _soups(self, choice: int) -> None:
        load_soups(soup_folders(self._root / "run"))

    def _bundle(self, choice: int) -> None:
        router = read_router(self._root / "routers.safetensors", GATES[choice % len(GATES)])
        bundle([read_expert(name, self._root / name) for name in "ab"], router)

    def _checkpoint(self, choice: int) -> None:
        Checkpoint(self._root / "base").sizes()

    def _library(self, choice: int) -> None:
        ExpertLibrary.load(self._root / "library").select(torch.ones(3))

    def _layout(self, choice: int) -> None:
        for entry in read_layout(self._root / "layout.json"):
            assert entry.length >= 0

    def _store(self, choice: int) -> None:
        """What lies in a store wrongly is made again."""
        built = self._stored.get_or_build(self._recipe, self._root.joinpath)
        assert built.path == self._lock.parent and built.rank >= 0


def write_seeds(target: Target, corpus: Path) -> None:
    """What the fuzzer begins with."""
    for number, name in enumerate(NAMES):
        good = target.good[name]
        if name.endswith(".safetensors"):
            content = bytes([number, 64]) + header_of(good)
            (corpus / f"{number}-header").write_bytes(content)
        (corpus / f"{number}-whole").write_bytes(bytes([number, 0]) + good)


def main(argv: list[str]) -> None:
    """Fuzzes until libFuzzer's options say stop."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        target = Target(Path(root).resolve())
        run(argv, target, lambda corpus: write_seeds(target, corpus))


if __name__ == "__main__":
    main(sys.argv)
