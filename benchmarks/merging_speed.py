"""Time and memory of merging 7B-shaped adapters, and the same merges by PEFT.

    python benchmarks/merging_speed.py [--layers 32] [--rounds 3] [--out FILE.json]

Three random adapters of rank 16 on all seven linears of Llama-2-7B's layers, in bfloat16 files.
Each measurement is a process of its own: it reads the three folders, merges in float32, and writes
one folder; the two tools take turns. Peak memory is that of the process, without what the imports
took. PEFT merges inside a model: it gets one of empty linears, so that no base weights are read.

    default    this project's arithmetic (core space for TIES and its kin)
    compat     PEFT's arithmetic, by this project
    peft       add_weighted_adapter

PEFT's `svd` and its `*_svd` kinds decompose dense deltas, minutes a layer: those are measured on
one 4096 x 4096 linear. Before anything is timed, compat must equal PEFT on small adapters.
mergekit merges whole models and has no merge of adapters; it is not measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parent.parent
RANK, COUNT = 16, 3
WEIGHTS = (0.5, 0.3, -0.2)
SHAPES = {  # in, out of Llama-2-7B
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008), "mlp.down_proj": (11008, 4096),
}  # fmt: skip
SMALL = {"self_attn.q_proj": (48, 40), "mlp.down_proj": (56, 48)}
DENSE = {"self_attn.q_proj": (4096, 4096)}

DEFAULT: dict[str, dict[str, Any]] = {
    "cat": {}, "svd": {"rank": RANK}, "ties": {}, "dare_ties": {}, "dare_linear": {},
    "magnitude_prune": {}, "della": {}, "breadcrumbs": {}, "knots_ties": {}, "iso": {}, "tsv": {},
    "cart": {}, "lego": {"k": RANK}, "robustmerge": {}, "lorahub": {},
}  # fmt: skip
LIKE_PEFT: dict[str, dict[str, Any]] = {
    "cat": {}, "linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5}, "magnitude_prune": {"density": 0.5},
}  # fmt: skip
DENSE_LIKE_PEFT: dict[str, dict[str, Any]] = {
    "svd": {"svd_rank": RANK}, "ties_svd": {"density": 0.2, "svd_rank": RANK},
    "magnitude_prune_svd": {"density": 0.5, "svd_rank": RANK},
}  # fmt: skip


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


def check(root: Path) -> None:
    """Ours with compat equals PEFT on small adapters. Raises SystemExit."""
    from vllm_lora_ext.merging import load_factors

    folders, worst = make_adapters(root / "small", SMALL, 2, torch.float32), 0.0
    for method, given in (LIKE_PEFT | DENSE_LIKE_PEFT).items():
        # PEFT's random masks cannot be repeated: DARE is compared where nothing is dropped.
        parameters = {**given, "density": 1.0} if method.startswith("dare") else given
        mine, theirs = root / f"{method}-mine", root / f"{method}-peft"
        merge_here(folders, mine, *like_peft(method, parameters))
        merge_by_peft(folders, theirs, method, parameters, empty_model(SMALL, 2))
        expected = load_factors(theirs / "merged").modules
        for name, pair in load_factors(mine).modules.items():
            delta = expected[name].delta()
            worst = max(worst, float((pair.delta() - delta).norm() / delta.norm()))
    if worst > 1e-4:
        raise SystemExit(f"check failed: a merge differs from PEFT's by {worst:.1e}")
    print(f"check passed: {len(LIKE_PEFT | DENSE_LIKE_PEFT)} kinds equal PEFT's to {worst:.0e}")


def child(job: Mapping[str, Any]) -> None:
    """One measurement; prints it as JSON."""
    folders, out = [Path(f) for f in job["folders"]], Path(job["out"])
    if job["tool"] == "peft":
        import peft  # noqa: F401

        shapes = {name: (k, n) for name, (k, n) in job["shapes"].items()}
        model = empty_model(shapes, job["layers"])
    else:
        import vllm_lora_ext.merging  # noqa: F401
    imports_mb = peak_mb()
    if job["tool"] == "peft":
        seconds = merge_by_peft(folders, out, job["method"], job["parameters"], model)
    else:
        seconds = merge_here(folders, out, job["method"], job["parameters"])
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb() - imports_mb}))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def jobs(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Everything that is measured."""
    whole = make_adapters(root / "whole", SHAPES, args.layers, torch.bfloat16)
    dense = make_adapters(root / "dense", DENSE, 1, torch.bfloat16)
    found: list[dict[str, Any]] = []

    def add(what: str, tool: str, method: str, parameters: dict[str, Any], small: bool) -> None:
        found.append({
            "what": what, "tool": tool, "method": method, "parameters": parameters,
            "shapes": DENSE if small else SHAPES, "layers": 1 if small else args.layers,
            "folders": [str(f) for f in (dense if small else whole)],
        })  # fmt: skip

    for method, parameters in DEFAULT.items():
        add(method, "default", method, parameters, False)
    for table, small in ((LIKE_PEFT, False), (DENSE_LIKE_PEFT, True)):
        for method, parameters in table.items():
            add(method, "compat", *like_peft(method, parameters), small)
            add(method, "peft", method, parameters, small)
    return found


def measure(job: dict[str, Any], root: Path) -> dict[str, Any]:
    out = Path(tempfile.mkdtemp(dir=root)) / "out"
    line = json.dumps({**job, "out": str(out)})
    done = subprocess.run(
        [sys.executable, __file__, "--job", line], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{job['tool']} {job['what']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    load, every = [], jobs(args, root)
    for turn in range(args.rounds):
        for job in every:
            dense = job["shapes"] is DENSE
            if dense and turn:
                continue  # minutes, and far apart
            load.append(os.getloadavg()[0])
            seen = measure(job, root)
            found.setdefault((job["what"], job["tool"], job["layers"], dense), []).append(seen)
            total = sum(seen["seconds"].values())
            print(f"{turn + 1}/{args.rounds} {job['tool']:8} {job['what']:20} {total:7.1f} s "
                  f"{seen['peak_mb']:6.0f} MB", flush=True)  # fmt: skip
    rows = [
        {
            "method": what, "tool": tool,
            "on": "one 4096 x 4096 linear" if dense else f"{layers} layers",
            **{f"{key}_s": round(statistics.median(s["seconds"][key] for s in seen), 3)
               for key in ("read", "merge", "write")},
            "peak_mb": round(max(s["peak_mb"] for s in seen)),
        }
        for (what, tool, layers, dense), seen in found.items()
    ]  # fmt: skip
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__, "threads": torch.get_num_threads(), "layers": args.layers,
        "rounds": args.rounds, "adapters": COUNT, "rank": RANK,
        "load_average": {"median": round(statistics.median(load), 2), "most": round(max(load), 2)},
        "mergekit": "not measured", "rows": rows,
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{COUNT} adapters of rank {RANK}, {report['layers']} layers of Llama-2-7B")
    for title in ("method", "tool", "on", "read s", "merge s", "write s", "peak MB", "PEFT / this"):
        table.add_column(title, justify="left" if title in ("method", "tool", "on") else "right")
    merging = {(r["method"], r["tool"]): r["merge_s"] for r in report["rows"]}
    for row in report["rows"]:
        theirs = merging.get((row["method"], "peft"))
        ratio = f"{theirs / row['merge_s']:.1f}" if theirs and row["tool"] == "compat" else ""
        cells = [f"{row[f'{key}_s']:.2f}" for key in ("read", "merge", "write")]
        table.add_row(row["method"], row["tool"], row["on"], *cells, str(row["peak_mb"]), ratio)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/results/merging_speed.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return child(json.loads(args.job))
    with tempfile.TemporaryDirectory() as place:
        check(Path(place))
        report = run(args, Path(place))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


if __name__ == "__main__":
    main()
