"""The merges that `merging_speed.py` times: adapters to merge, by this project and by PEFT."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, COUNT = 16, 4
WEIGHTS = (0.5, 0.3, -0.2, 0.4)


def make_adapters(
    root: Path, shapes: Mapping[str, tuple[int, int]], layers: int, dtype: torch.dtype
) -> list[Path]:
    """Random PEFT folders; the spectrum of B A falls off as trained ones' do."""
    draw = torch.Generator().manual_seed(0)
    decay_R = 0.8 ** torch.arange(RANK)
    folders = []
    for i in range(COUNT):
        tensors = {}
        for layer in range(layers):
            for name, (width, out) in shapes.items():
                stem = f"base_model.model.model.layers.{layer}.{name}"
                a_RK = torch.randn(RANK, width, generator=draw) / width**0.5
                b_NR = torch.randn(out, RANK, generator=draw) * decay_R * 0.02
                tensors[f"{stem}.lora_A.weight"] = a_RK.to(dtype)
                tensors[f"{stem}.lora_B.weight"] = b_NR.to(dtype)
        folder = root / f"adapter-{i}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
                  "target_modules": sorted(name.split(".")[1] for name in shapes)}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


class Clock:
    """Seconds by the name of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class Memory:
    """Largest resident memory of this process from now on (Linux).

    Not getrusage's: a child's begins at what its parent had.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # without it the imports' own peak counts, too
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._megabytes("VmRSS")

    def peaks(self) -> dict[str, float]:
        whole = self._megabytes("VmHWM")
        return {"peak_mb": whole - self._before, "process_mb": whole}

    @staticmethod
    def _megabytes(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(f"{field}:"))


def merge_here(
    folders: list[Path], out: Path, method: str, parameters: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of reading, merging and writing."""
    from vllm_lora_ext.merging import Term, load_factors, merge, save_peft

    clock = Clock()
    terms = [Term(load_factors(f), w) for f, w in zip(folders, WEIGHTS, strict=True)]
    clock.lap("read")
    merged = merge(method, terms, parameters)
    clock.lap("merge")
    save_peft(merged.factors, out)
    clock.lap("write")
    return clock.seconds


def like_mergekit(method: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What mergekit's method is called here, an adapter of rank 16 coming out."""
    if method == "task_arithmetic":
        return "svd", {**parameters, "rank": RANK}
    return method, {**parameters, "rank": RANK, "compat": "mergekit"}


def like_peft(method: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What PEFT's combination type is called here."""
    said = {**parameters, "compat": "peft"}
    if method == "svd" or not method.endswith("_svd"):
        return method, said
    return method.removesuffix("_svd"), {**said, "space": "full"}


def merge_by_peft(
    folders: list[Path], out: Path, method: str, parameters: Mapping[str, Any], model: Any
) -> dict[str, float]:
    """The same by PEFT; its adapters are fp32 in memory, as ours are."""
    from peft import PeftModel

    names = [f"a{i}" for i in range(len(folders))]
    clock = Clock()
    tuned = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        tuned.load_adapter(folder, adapter_name=name)
    clock.lap("read")
    tuned.add_weighted_adapter(names, list(WEIGHTS), "merged", method, **parameters)
    clock.lap("merge")
    tuned.save_pretrained(out, selected_adapters=["merged"], save_embedding_layers=False)
    clock.lap("write")
    return clock.seconds


def empty_model(shapes: Mapping[str, tuple[int, int]], layers: int) -> torch.nn.Module:
    """Linears under Llama's names; each weight is one zero, seen as a matrix."""
    root = torch.nn.Module()
    for layer in range(layers):
        for name, (width, out) in shapes.items():
            linear = torch.nn.Linear(width, out, bias=False, device="meta")
            weight = torch.zeros(1, 1).expand(out, width)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            parent = root
            *path, last = f"model.layers.{layer}.{name}".split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]  # type: ignore[assignment]
            parent.add_module(last, linear)
    return root


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    from vllm_lora_ext.merging import load_factors

    return {name: pair.delta() for name, pair in load_factors(folder).modules.items()}


def norm(folder: Path) -> float:
    """Of an adapter's deltas, all of them together."""
    from vllm_lora_ext.merging import load_factors

    grams = [(b.t() @ b) * (a @ a.t()) for a, b in load_factors(folder).modules.values()]
    return float(sum(gram.sum() for gram in grams)) ** 0.5
