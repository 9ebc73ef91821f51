"""What LoRA costs a server: ratios against stock vLLM, measured in one run.

    python benchmarks/serving_overhead.py [--batches 1,8,32] [--rounds 9] [--stock-rounds 2]
        [--out FILE.json]

Four engines on SmolLM2-135M (CPU, bf16), each in a process of its own, taking turns so that a
machine that speeds up or slows down does so for all:

    base      stock vLLM without LoRA
    stock     stock vLLM, LoRA on: base requests and plain LoRA of rank 8 and 16, all seven linears
    plugin    the plugin: base requests, the same plain adapters, and a routed adapter
              (E=8, k=2, r=8 in every linear: 16 ranks work on each token)

overhead = (time - base time) / base time, the median over rounds of a round's own ratio. Stock
vLLM's LoRA takes minutes a round and its differences are large, so it gets fewer rounds. What base
requests cost on the plugin's server is less than two starts of one engine differ by: that number
is in base_requests.py, which starts the engines several times.

Before anything is timed, every adapter's greedy tokens are compared with the same adapter's in
transformers; on a difference nothing is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]

from benchmarks.engine import Engine, check_greedy  # noqa: E402

RANK, EXPERTS, TOP_K = 8, 8, 2
PREFILL, DECODE = 64, 32
ENGINES: dict[str, tuple[str, ...]] = {
    "base": ("base",),
    "stock": ("base", "plain8", "plain16"),
    "plugin": ("base", "plain8", "plain16", "routed"),
}


def make_adapters(base: str, root: Path) -> dict[str, Path]:
    """Random adapters on all seven linears: plain of rank 8 and 16 (PEFT files), and routed."""
    from transformers import AutoConfig

    from tests.make_adapters import linear_shapes, normal
    from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
    from vllm_lora_ext.adapters.readers.native import write_native
    from vllm_lora_ext.routing import GateSpec

    shapes, rng = linear_shapes(AutoConfig.from_pretrained(base)), np.random.default_rng(0)
    folders = {}
    for rank in (RANK, TOP_K * RANK):
        folders[f"plain{rank}"] = _write_plain(root / f"plain{rank}", shapes, rank, rng)
    gate = GateSpec(
        source="router", blocks=(RANK,) * EXPERTS, score="softmax", select="top_k", k=TOP_K,
        weight="renormalise",
    )  # fmt: skip
    total = RANK * EXPERTS
    modules = {
        name: RoutedModule(
            normal(rng, total, k) / k**0.5, normal(rng, n, total) * 0.02, gate,
            normal(rng, EXPERTS, k) / k**0.5,
        )
        for name, (k, n) in shapes.items()
    }  # fmt: skip
    folders["routed"] = root / "routed"
    write_native(RoutedAdapter(modules, "routed"), folders["routed"])
    return folders


def _write_plain(folder: Path, shapes: Any, rank: int, rng: Any) -> Path:
    from safetensors.torch import save_file

    from tests.make_adapters import normal

    folder.mkdir(parents=True)
    tensors = {}
    for name, (k, n) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = normal(rng, rank, k) / k**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = normal(rng, n, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets,
              "bias": "none", "base_model_name_or_path": "smollm2"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def check(engine: Engine, base: str, folders: dict[str, Path]) -> None:
    """First tokens of the engine against transformers, up to the first near tie."""
    from transformers import AutoModelForCausalLM

    from vllm_lora_ext.adapters.hf import apply_adapter
    from vllm_lora_ext.adapters.registry import load_adapter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    prompt = np.random.default_rng(1).integers(1000, 20000, 32).tolist()
    for what in ENGINES["plugin"]:
        _, ((*got,),) = engine.ask(what, [prompt], 8)
        handle = apply_adapter(model, load_adapter(folders[what])) if what != "base" else None
        check_greedy(model, prompt, got, what)
        if handle is not None:
            handle.remove()
    print("check passed: greedy tokens equal transformers' for", ", ".join(ENGINES["plugin"]))


def warm_up(engines: dict[str, Engine], batch: int) -> None:
    """Allocations, and shapes that the compiler has not seen."""
    prompts = np.random.default_rng(3).integers(1000, 20000, (batch, 16)).tolist()
    for kind, whats in ENGINES.items():
        for what in whats:
            engines[kind].ask(what, prompts, 4)


def measure(
    engines: dict[str, Engine], batch: int, rounds: int, stock_rounds: int
) -> dict[str, list[float]]:
    """Seconds per phase and round; decode is a long generation minus the same with one token."""
    times: dict[str, list[float]] = {}
    rng = np.random.default_rng(2)
    for turn in range(rounds):
        prompts = rng.integers(1000, 20000, (batch, PREFILL)).tolist()
        short = [p[:16] for p in prompts]
        for kind in ("base", "plugin", "stock") if turn < stock_rounds else ("base", "plugin"):
            ask = engines[kind].ask
            engines[kind].wake()
            for what in ENGINES[kind]:
                prefill = ask(what, prompts, 1)[0]
                one, many = ask(what, short, 1)[0], ask(what, short, DECODE + 1)[0]
                times.setdefault(f"{kind}/{what}/prefill/{batch}", []).append(prefill)
                times.setdefault(f"{kind}/{what}/decode/{batch}", []).append(many - one)
        print(f"batch {batch}: round {turn + 1}/{rounds}", flush=True)
    return times


def table(times: dict[str, list[float]], batches: list[int]) -> list[dict[str, Any]]:
    """A row per engine and request kind: overhead over the base engine, by phase and batch."""
    rows = []
    for kind, whats in ENGINES.items():
        for what in whats:
            if kind == "base":
                continue
            row: dict[str, Any] = {"engine": kind, "requests": what}
            for phase in ("decode", "prefill"):
                for batch in batches:
                    base = times[f"base/base/{phase}/{batch}"]
                    mine = times[f"{kind}/{what}/{phase}/{batch}"]
                    ratios = [t / b for t, b in zip(mine, base, strict=False)]
                    row[f"{phase} {batch}"] = statistics.median(ratios) - 1
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stock-rounds", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=REPO / "benchmarks/results/serving_overhead.json"
    )
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    from base_model import ensure_base

    base = str(ensure_base())
    cores = f"0-{os.cpu_count() - 1}"  # type: ignore[operator]
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(base, Path(scratch))
        for kind, whats in ENGINES.items():
            adapters = {what: folders[what] for what in whats if what != "base"}
            engines[kind] = Engine(kind, base, adapters, cores)
            print(f"engine {kind} ready", flush=True)

        try:
            check(engines["plugin"], base, folders)
            warm_up(engines, max(batches))
            times: dict[str, list[float]] = {}
            for i, batch in enumerate(batches, 1):
                times |= measure(engines, batch, args.rounds, args.stock_rounds)
                save(args.out, times, batches[:i])
        finally:
            for engine in engines.values():
                engine.stop()
    show(table(times, batches))


def save(out: Path, times: dict[str, list[float]], batches: list[int]) -> None:
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__,
        "prefill_tokens": PREFILL, "decode_tokens": DECODE, "seconds": times,
        "overhead": table(times, batches),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title="overhead over the base engine (0 % is free)")
    for key in rows[0]:
        out.add_column(key)
    for row in rows:
        out.add_row(*(f"{v:+.0%}" if isinstance(v, float) else v for v in row.values()))
    Console().print(out)


if __name__ == "__main__":
    main()
