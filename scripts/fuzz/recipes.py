"""Fuzz target: a recipe's file, the name of a mix, LoRAX's `merged_adapters`.

    python scripts/fuzz/recipes.py CORPUS [libFuzzer's options]
    python scripts/fuzz/recipes.py --show INPUT
    python scripts/fuzz/recipes.py --merge SMALL CORPUS

The first byte of an input chooses which of them the rest is, the second whether the server has
roots. Whatever it is, it gives a job or one `AdapterError` with a code of docs/errors.md; what it
gives is JSON, and written down and read again it is the same.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import atheris
import torch  # noqa: F401 before the instrumentation: it is not what is tested

with atheris.instrument_imports(include=["vllm_lora_ext"]):
    from vllm_lora_ext.errors import AdapterError
    from vllm_lora_ext.merging.recipes import parse_recipe
    from vllm_lora_ext.serving.lorax import from_lorax
    from vllm_lora_ext.serving.mix_name import Mix, is_mix_name, parse
    from vllm_lora_ext.serving.sources import Job, Sources
    from vllm_lora_ext.settings import MergeSettings

from changes import CODES, run

FILE, NAME, LORAX = range(3)
RECIPES = (
    b"version: 1\nmerge_method: ties\nparameters: {density: 0.2, seed: 0, lambda: 1.0}\nmodels:\n"
    b"- {model: a, parameters: {weight: 0.5}}\n- {model: below, parameters: {density: 0.3}}\n"
    b"output: {rank: 4, on_overflow: truncate, dtype: bfloat16}\n",
    b"version: 1\nmerge_method: cat\nbase_model: tiny\nmodels:\n- model: a\n  parameters:\n"
    b"    weight:\n    - {filter: mlp, value: 0.5}\n    - {value: [0.2, 0.4]}\n",
    json.dumps({"version": 1, "merge_method": "pipeline", "steps": [
        {"id": "a", "op": "load", "model": "a"},
        {"id": "b", "op": "truncate", "input": "a", "rank": 2},
        {"id": "c", "op": "convert", "model": "below", "settings": {"stage": 1}},
        {"id": "out", "op": "merge", "method": "della", "inputs": {"b": 1.0, "c": {"weight": 0.4,
         "epsilon": 0.1}}, "parameters": {"compat": "mergekit", "normalize": True}},
    ]}).encode(),
    json.dumps({"version": 1, "merge_method": "lego", "masks": "recipe.yaml", "models": [
        {"model": "~nosuchuser/b"}, {"model": "a\0"}, {"model": "../b"},
    ]}).encode(),
    json.dumps({"version": 1, "merge_method": "svd", "models": [{"model": "a"}, {"model": "b"}],
                "parameters": {"svd_rank": 3, "compat": "peft", "svd_clamp": 0.9}}).encode(),
)  # fmt: skip
NAMES = (
    "cat:a*0.6+b*-0.4", "svd[r=2]:a+b", "ties[d=0.2,r=4,s=7]:a+b*.5", "linear[c=lorax]:b+a",
    "dare_ties[n=true]:a+b", "recipe:weekly",
    'describe:"a  text \\u00e9"', "cat[e=0.9,l=2.5]:a/x+b",
)  # fmt: skip
REQUESTS = (
    {"ids": ["a", "b"], "weights": [0.5, 1], "merge_strategy": "ties", "density": 0.5,
     "majority_sign_method": "frequency"},
    {"ids": ["a", "b"]}, {"ids": ["b"], "weights": [], "merge_strategy": "dare_linear"},
)  # fmt: skip


class Known:
    """The adapters of a server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def adapters(self) -> Mapping[str, tuple[str, str]]:
        return {name: (str(self._folder), "v1") for name in ("a", "b", "a/x")}

    def folder(self, path: str) -> Path:
        return Path(path)


class Target:
    """What the fuzzer calls."""

    def __init__(self, root: Path) -> None:
        (root / "below").mkdir()
        self._file, self._writes = root / "recipe.yaml", 0
        settings = MergeSettings(store=root / "store", recipes={"weekly": self._file})
        self._known = Known(root / "below")
        self._sources = [Sources(settings, roots, self._known) for roots in (None, [root])]
        self._write(RECIPES[0])

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        try:
            (self._of_file, self._of_name, self._of_lorax)[data[0] % 3](
                data[2:], self._sources[data[1] % 2]
            )
        except AdapterError as error:
            assert error.code in CODES, error.code
            assert len(str(error)) < 1 << 16, "an error as long as what is wrong"

    def _write(self, content: bytes) -> None:
        self._file.write_bytes(content)
        self._writes += 1
        os.utime(self._file, ns=(0, self._writes))  # another file than the one before

    def _of_file(self, content: bytes, sources: Sources) -> None:
        self._write(content)
        try:
            job = sources.job_of_file(str(self._file), self._known.adapters())
            recipe = _same(job)["recipe"]
        finally:
            self._write(RECIPES[0])
        assert parse_recipe(recipe).model_dump(mode="json") == recipe, "it reads otherwise again"

    def _of_name(self, content: bytes, sources: Sources) -> None:
        text = content.decode("utf-8", "surrogateescape")  # JSON's texts may hold halves, too
        mix = parse(text)
        assert is_mix_name(text), "a mix's name may be another model's"
        self._check(mix, sources)

    def _of_lorax(self, content: bytes, sources: Sources) -> None:
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            return
        self._check(from_lorax(said), sources)

    def _check(self, mix: Mix, sources: Sources) -> None:
        assert parse(str(mix)) == mix, "it reads otherwise again"
        made = _same(sources.job_of(mix))
        if "recipe" in made:
            parse_recipe(made["recipe"])


def _same(job: Job) -> dict[str, Any]:
    """A job's request, after its way to another process."""
    made = job.request()
    read: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert read == made, "it is not what JSON holds"
    return read


def write_seeds(corpus: Path) -> None:
    """What the fuzzer begins with."""
    texts = {
        FILE: RECIPES, NAME: [name.encode() for name in NAMES],
        LORAX: [json.dumps(said).encode() for said in REQUESTS],
    }  # fmt: skip
    for kind, several in texts.items():
        for number, text in enumerate(several):
            (corpus / f"{kind}-{number}").write_bytes(bytes([kind, number % 2]) + text)


def main(argv: list[str]) -> None:
    """Fuzzes until libFuzzer's options say stop."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        run(argv, Target(Path(root).resolve()), write_seeds)


if __name__ == "__main__":
    main(sys.argv)
