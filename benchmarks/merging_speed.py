"""Time and memory of merging 7B-shaped adapters, and the same merges by PEFT and mergekit.

    python benchmarks/merging_speed.py [--layers 32] [--rounds 2] [--out FILE.json]
        [--mergekit-python MERGEKIT/bin/python]

Four random adapters of rank 16 on all seven linears of Llama-2-7B's layers, in bfloat16 files.
Each measurement is a process of its own: it reads the four folders, merges in float32, and writes
one folder; the tools take turns. Peak memory is that of the process, without what the imports took
(in the file also with it, `process_mb`). PEFT merges inside a model: it gets one of empty linears,
so that no base weights are read.

    default             this project's arithmetic (core space for TIES and its kin)
    compat: peft        PEFT's arithmetic, by this project
    peft                add_weighted_adapter
    compat: mergekit    mergekit's arithmetic (dense deltas), by this project
    mergekit            mergekit itself

PEFT's `svd` and its `*_svd` kinds, and mergekit, decompose dense deltas, minutes a layer: those are
measured on one 4096 x 4096 linear, once, and so is what they are compared with.

mergekit merges whole models, so an adapter goes a longer way through it, and each part is timed:
`base`, the adapters are merged into the base weight (by PEFT, as for `base+lora`); `merge`, its
method on base and tuned weights; `extract`, the SVD by which mergekit-extract-lora gets an adapter
of rank 16 out of the result. All in float32 and in memory: that the real commands write every tuned
model to disk and read it again is left out. Ours, default too, gives an adapter of rank 16 here.
The ratio compares everything between reading and writing: base + merge + extract with our merge.
Dense deltas are cut to rank 16 by an SVD there, by subspace iteration here: `kept` is the norm of
our adapter by that of theirs.

mergekit's dependencies are not vLLM's, so it lives in an environment of its own:

    python3.11 -m venv MERGEKIT
    MERGEKIT/bin/pip install torch==2.13.0
    MERGEKIT/bin/pip install mergekit==0.1.5

Before anything is timed, compat must equal PEFT on small adapters, and mergekit-yaml and
mergekit-extract-lora on a small Llama with the same adapters, and so must the calls that are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from merging_checks import (
    DENSE_LIKE_PEFT,
    LIKE_MERGEKIT,
    LIKE_PEFT,
    Q,
    answer,
    by_mergekit,
    check_mergekit,
    check_peft,
)
from merging_ways import (
    COUNT,
    RANK,
    WEIGHTS,
    Memory,
    empty_model,
    like_mergekit,
    like_peft,
    make_adapters,
    merge_by_peft,
    merge_here,
    norm,
)
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured: give --mergekit-python"
SHAPES = {  # in, out of Llama-2-7B
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008), "mlp.down_proj": (11008, 4096),
}  # fmt: skip
DENSE = {Q: SHAPES[Q]}
ONE_LINEAR = "4096 x 4096"
DEFAULT: dict[str, dict[str, Any]] = {
    "cat": {}, "svd": {"rank": RANK}, "ties": {}, "dare_ties": {}, "dare_linear": {},
    "magnitude_prune": {}, "della": {}, "breadcrumbs": {}, "knots_ties": {}, "iso": {}, "tsv": {},
    "cart": {}, "lego": {"k": RANK}, "robustmerge": {}, "lorahub": {},
}  # fmt: skip
PARTS = ("read", "base", "merge", "extract", "write")


def child(job: Mapping[str, Any]) -> None:
    """One measurement; prints it as JSON."""
    folders, out = [Path(f) for f in job["folders"]], Path(job["out"])
    if job["tool"] == "peft":
        import peft  # noqa: F401

        shapes = {name: (k, n) for name, (k, n) in job["shapes"].items()}
        model = empty_model(shapes, job["layers"])
    else:
        import vllm_lora_ext.merging  # noqa: F401
    memory = Memory()
    if job["tool"] == "peft":
        seconds = merge_by_peft(folders, out, job["method"], job["parameters"], model)
    else:
        seconds = merge_here(folders, out, job["method"], job["parameters"])
    print(json.dumps({"seconds": seconds, **memory.peaks()}))


def jobs(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Everything that is measured."""
    whole = make_adapters(root / "whole", SHAPES, args.layers, torch.bfloat16)
    dense = make_adapters(root / "dense", DENSE, 1, torch.bfloat16)
    base = root / "base.safetensors"
    weight_NK = torch.randn(DENSE[Q], generator=torch.Generator().manual_seed(1)) * 0.02
    save_file({f"model.layers.0.{Q}.weight": weight_NK}, base)
    found: list[dict[str, Any]] = []

    def add(
        what: str, tool: str, method: str, parameters: dict[str, Any], small: bool, **more: Any
    ) -> None:
        found.append({
            "what": what, "tool": tool, "method": method, "parameters": parameters,
            "shapes": DENSE if small else SHAPES, "layers": 1 if small else args.layers,
            "on": ONE_LINEAR if small else f"{args.layers} layers",
            "folders": [str(f) for f in (dense if small else whole)], **more,
        })  # fmt: skip

    for method, parameters in DEFAULT.items():
        add(method, "default", method, parameters, False)
    for table, small in ((LIKE_PEFT, False), (DENSE_LIKE_PEFT, True)):
        for method, parameters in table.items():
            add(method, "compat: peft", *like_peft(method, parameters), small)
            add(method, "peft", method, parameters, small)
    for method, parameters in LIKE_MERGEKIT.items():
        ours, given = like_mergekit(method, parameters)
        own = {key: value for key, value in given.items() if key != "compat"}
        add(method, "default", ours, own, True)
        add(method, "compat: mergekit", ours, given, True)
        if args.mergekit_python:
            more = {"base": str(base), "rank": RANK, "weights": WEIGHTS}
            add(method, "mergekit", method, parameters, True, **more)
    return found


def measure(job: dict[str, Any], root: Path, mergekit_python: str) -> dict[str, Any]:
    place = Path(tempfile.mkdtemp(dir=root))
    made = {**job, "out": str(place / "out")}
    if job["tool"] == "mergekit":
        seen = by_mergekit(mergekit_python, made)
    else:
        line = [sys.executable, __file__, "--job", json.dumps(made)]
        seen = answer(line, f"{job['tool']} {job['what']}")
    written = place / ("out/merged" if job["tool"] == "peft" else "out")
    if job["on"] == ONE_LINEAR and written.exists():
        seen["norm"] = norm(written)
    shutil.rmtree(place)
    return seen


def run(args: argparse.Namespace, root: Path, mergekit: Mapping[str, Any] | str) -> dict[str, Any]:
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    load, every = [], jobs(args, root)
    for turn in range(args.rounds):
        for job in every:
            if job["on"] == ONE_LINEAR and turn:
                continue  # minutes, and far apart
            load.append(os.getloadavg()[0])
            seen = measure(job, root, args.mergekit_python)
            found.setdefault((job["what"], job["tool"], job["on"]), []).append(seen)
            total = sum(seen["seconds"].values())
            print(f"{turn + 1}/{args.rounds} {job['tool']:16} {job['what']:20} {total:7.1f} s "
                  f"{seen['peak_mb']:6.0f} MB", flush=True)  # fmt: skip
    rows = [
        {
            "method": what, "tool": tool, "on": on,
            **{f"{key}_s": round(statistics.median(s["seconds"][key] for s in seen), 3)
               for key in seen[0]["seconds"]},
            **{key: round(max(s[key] for s in seen)) for key in ("peak_mb", "process_mb")},
            **{key: seen[0][key] for key in ("norm",) if key in seen[0]},
        }
        for (what, tool, on), seen in found.items()
    ]  # fmt: skip
    rows = with_ratios(rows)
    worst = min(row.get("norm_by_theirs", 1.0) for row in rows)
    if worst < 0.99:
        raise SystemExit(
            f"check failed: a cut to rank {RANK} keeps {worst:.3f} of what theirs keeps"
        )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__, "threads": torch.get_num_threads(), "layers": args.layers,
        "rounds": args.rounds, "adapters": COUNT, "rank": RANK,
        "load_average": {"median": round(statistics.median(load), 2), "most": round(max(load), 2)},
        "mergekit": mergekit, "rows": rows,
    }  # fmt: skip


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of compat get what they are compared with, where it was measured.

    `theirs_by_ours`, seconds of all but reading and writing; `norm_by_theirs`, of the adapter.
    """

    def seconds(row: Mapping[str, Any]) -> float:
        return sum(row.get(f"{key}_s", 0.0) for key in ("base", "merge", "extract"))

    tools = {(row["method"], row["on"], f"compat: {row['tool']}"): row for row in rows}
    found = []
    for row in rows:
        theirs = tools.get((row["method"], row["on"], row["tool"]))
        if theirs:
            row = {**row, "theirs_by_ours": round(seconds(theirs) / seconds(row), 2)}
            if "norm" in row and "norm" in theirs:
                row["norm_by_theirs"] = round(row["norm"] / theirs["norm"], 5)
        found.append(row)
    return found


def show(report: dict[str, Any]) -> None:
    """Two tables: whole models, and the one linear."""
    from rich.console import Console
    from rich.table import Table

    whole = f"{report['layers']} layers"
    for on, where in ((whole, f"{whole} of Llama-2-7B"), (ONE_LINEAR, f"one {ONE_LINEAR} linear")):
        rows = [row for row in report["rows"] if row["on"] == on]
        parts = [key for key in PARTS if any(f"{key}_s" in row for row in rows)]
        table = Table(title=f"{COUNT} adapters of rank {RANK}, {where}")
        for title in ("method", "tool"):
            table.add_column(title)
        for title in (*(f"{key} s" for key in parts), "peak MB", "theirs / ours", "kept"):
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(*cells(row, parts))
        if on == ONE_LINEAR and report["mergekit"] == NOT_MEASURED:
            table.add_row("all", f"mergekit {NOT_MEASURED}")
        Console(width=130).print(table)


def cells(row: Mapping[str, Any], parts: list[str]) -> list[str]:
    """A line of the table."""
    found = [f"{row[f'{key}_s']:.2f}" if f"{key}_s" in row else "" for key in parts]
    found.append(str(row["peak_mb"]))
    found.append(f"{row['theirs_by_ours']:.1f}" if "theirs_by_ours" in row else "")
    found.append(f"{row['norm_by_theirs']:.4f}" if "norm_by_theirs" in row else "")
    return [row["method"], row["tool"], *found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mergekit-python", default="", help="of an environment with mergekit")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/results/merging_speed.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return child(json.loads(args.job))
    with tempfile.TemporaryDirectory() as place:
        mergekit: dict[str, Any] | str = NOT_MEASURED
        check_peft(Path(place, "peft"))
        if args.mergekit_python:
            mergekit = check_mergekit(args.mergekit_python, Path(place, "mergekit"))
        report = run(args, Path(place), mergekit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


if __name__ == "__main__":
    main()
