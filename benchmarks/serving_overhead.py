"""What LoRA costs a server: ratios against stock vLLM, measured in one run.

    python benchmarks/serving_overhead.py [--batches 1,8,32] [--rounds 9] [--stock-rounds 2]
        [--pairs 30] [--out FILE.json]

Four engines on SmolLM2-135M (CPU, bf16), each in a process of its own, taking turns so that a
machine that speeds up or slows down does so for all:

    base      stock vLLM without LoRA
    stock     stock vLLM, LoRA on: base requests and plain LoRA of rank 8 and 16, all seven linears
    plugin    the plugin: base requests, the same plain adapters, and a routed adapter
              (E=8, k=2, r=8 in every linear: 16 ranks work on each token)

overhead = (time - base time) / base time, the median over rounds of a round's own ratio. Stock
vLLM's LoRA takes minutes a round and its differences are large, so it gets fewer rounds. Base
requests on the plugin's server differ from the base engine by less than a round's noise, so they
are measured once more in pairs, the two engines in turn and each first in every other pair.

Before anything is timed, every adapter's greedy tokens are compared with the same adapter's in
transformers; on a difference nothing is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]
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


def serve(kind: str, base: str, folders: dict[str, Path], pipe: Any, cores: str) -> None:
    """One engine's process: answers (what, prompts, number of tokens) with seconds and tokens."""
    os.environ |= {
        "VLLM_LORA_EXT_DISABLE": "0" if kind == "plugin" else "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 64} if kind != "base" else {}
    llm = LLM(
        model=base, dtype="bfloat16", max_model_len=512, max_num_seqs=32, seed=0,
        max_num_batched_tokens=2048, enable_prefix_caching=False, disable_log_stats=True, **lora,
    )  # fmt: skip
    adapters = {
        name: LoRARequest(name, i, str(folders[name]))
        for i, name in enumerate(ENGINES[kind], 1)
        if name != "base"
    }
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        what, prompts, count = job
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params,
            lora_request=adapters.get(what), use_tqdm=False,
        )  # fmt: skip
        pipe.send((time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]))


def check(ask: Any, base: str, folders: dict[str, Path]) -> None:
    """First tokens of the engine against transformers, up to the first near tie."""
    from transformers import AutoModelForCausalLM

    from vllm_lora_ext.adapters.hf import apply_adapter
    from vllm_lora_ext.adapters.registry import load_adapter

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    prompt = np.random.default_rng(1).integers(1000, 20000, 32).tolist()
    for what in ENGINES["plugin"]:
        _, ((*got,),) = ask("plugin", what, [prompt], 8)
        handle = apply_adapter(model, load_adapter(folders[what])) if what != "base" else None
        ids = list(prompt)
        for step, token in enumerate(got):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1].float()
            top2 = logits.topk(2)
            if int(top2.indices[0]) != token:
                gap = float(top2.values[0] - logits[token])
                if gap > 0.25:
                    raise SystemExit(f"check failed: {what}, token {step}, logit gap {gap:.2f}")
                break
            ids.append(token)
        if handle is not None:
            handle.remove()
    print("check passed: greedy tokens equal transformers' for", ", ".join(ENGINES["plugin"]))


def warm_up(ask: Any, batch: int) -> None:
    """Allocations, and shapes that the compiler has not seen."""
    prompts = np.random.default_rng(3).integers(1000, 20000, (batch, 16)).tolist()
    for kind, whats in ENGINES.items():
        for what in whats:
            ask(kind, what, prompts, 4)


def wake(ask: Any, kind: str) -> None:
    """A request that is not timed: after the other engine's turn, an engine's first one finds its
    threads asleep and the caches full of the other's weights."""
    ask(kind, "base", [list(range(1000, 1000 + PREFILL))], 2)


def measure(ask: Any, batch: int, rounds: int, stock_rounds: int) -> dict[str, list[float]]:
    """Seconds per phase and round; decode is a long generation minus the same with one token."""
    times: dict[str, list[float]] = {}
    rng = np.random.default_rng(2)
    for turn in range(rounds):
        prompts = rng.integers(1000, 20000, (batch, PREFILL)).tolist()
        short = [p[:16] for p in prompts]
        for kind in ("base", "plugin", "stock") if turn < stock_rounds else ("base", "plugin"):
            wake(ask, kind)
            for what in ENGINES[kind]:
                prefill = ask(kind, what, prompts, 1)[0]
                one, many = ask(kind, what, short, 1)[0], ask(kind, what, short, DECODE + 1)[0]
                times.setdefault(f"{kind}/{what}/prefill/{batch}", []).append(prefill)
                times.setdefault(f"{kind}/{what}/decode/{batch}", []).append(many - one)
        print(f"batch {batch}: round {turn + 1}/{rounds}", flush=True)
    return times


def measure_pairs(ask: Any, batch: int, pairs: int) -> dict[str, list[float]]:
    """Time of a base request in the plugin's engine over that in the base engine, per pair."""
    ratios: dict[str, list[float]] = {}
    rng = np.random.default_rng(4)
    for turn in range(pairs):
        prompts = rng.integers(1000, 20000, (batch, PREFILL)).tolist()
        kinds = ("base", "plugin") if turn % 2 else ("plugin", "base")
        for phase, count in (("prefill", 1), ("decode", DECODE)):
            # A decode's prompt is four tokens a request: the generation is what takes the time.
            sent = prompts if phase == "prefill" else [p[:4] for p in prompts]
            seconds = {}
            for kind in kinds:
                wake(ask, kind)
                seconds[kind] = ask(kind, "base", sent, count)[0]
            ratio = seconds["plugin"] / seconds["base"]
            ratios.setdefault(f"{phase}/{batch}", []).append(ratio)
    medians = {key: f"{statistics.median(values) - 1:+.1%}" for key, values in ratios.items()}
    print(f"batch {batch}, base requests in {pairs} pairs: {medians}", flush=True)
    return ratios


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
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument(
        "--out", type=Path, default=REPO / "benchmarks/results/serving_overhead.json"
    )
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    from base_model import ensure_base

    base = str(ensure_base())
    cores = f"0-{os.cpu_count() - 1}"  # type: ignore[operator]
    context, pipes, processes = mp.get_context("spawn"), {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_adapters(base, Path(scratch))
        for kind in ENGINES:
            pipes[kind], far = context.Pipe()
            process = context.Process(target=serve, args=(kind, base, folders, far, cores))
            process.start()
            processes.append(process)
            assert pipes[kind].recv() == "ready"
            print(f"engine {kind} ready", flush=True)

        def ask(kind: str, *job: Any) -> Any:
            pipes[kind].send(job)
            return pipes[kind].recv()

        try:
            check(ask, base, folders)
            warm_up(ask, max(batches))
            times: dict[str, list[float]] = {}
            pairs: dict[str, list[float]] = {}
            for batch in batches:
                pairs |= measure_pairs(ask, batch, args.pairs)
            for i, batch in enumerate(batches, 1):
                times |= measure(ask, batch, args.rounds, args.stock_rounds)
                save(args.out, times, pairs, batches[:i])
        finally:
            for kind in pipes:
                pipes[kind].send(None)
            for process in processes:
                process.join(20)
    show(table(times, batches))


def save(
    out: Path, times: dict[str, list[float]], pairs: dict[str, list[float]], batches: list[int]
) -> None:
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__,
        "prefill_tokens": PREFILL, "decode_tokens": DECODE, "seconds": times,
        "overhead": table(times, batches),
        "base_requests_in_pairs": {k: statistics.median(v) - 1 for k, v in pairs.items()},
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
