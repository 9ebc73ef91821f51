"""What a server with the plugin costs the requests that use no adapter.

    python benchmarks/base_requests.py [--starts 6] [--pairs 8] [--batches 1,8,32] [--add]

The same prompts go to stock vLLM without LoRA and to vLLM with LoRA and the plugin, in turn, each
first in every other pair. Two starts of one and the same engine differ by some percent, depending
on where their weights came to lie in memory and on which of the two was started first. So both are
started several times, each first in every other: a start's number is the median over its pairs,
the result the mean of both orders' medians over starts, and its spread is printed.

    python benchmarks/base_requests.py --same

compares the base engine with itself: how far from 0 % a result of this method can be by chance.

Nothing is timed before both engines gave the greedy tokens of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]

from benchmarks.engine import Engine, check_greedy  # noqa: E402

PREFILL, DECODE = 64, 32


def check(engines: list[Engine], model: str) -> None:
    """Greedy tokens of every engine against transformers."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    prompts = np.random.default_rng(1).integers(1000, 20000, (4, 32)).tolist()
    for engine in engines:
        for prompt, tokens in zip(prompts, engine.ask("base", prompts, 8)[1], strict=True):
            check_greedy(plain, prompt, tokens, "base")


def measure(base: Engine, other: Engine, batch: int, pairs: int) -> dict[str, list[float]]:
    """Time in `other` over time in `base`, by phase and pair."""
    rng, ratios = np.random.default_rng(batch), {}
    for turn in range(pairs):
        prompts = rng.integers(1000, 20000, (batch, PREFILL)).tolist()
        # A decode's prompt is four tokens a request: the generation is what takes the time.
        jobs = {"prefill": (prompts, 1), "decode": ([p[:4] for p in prompts], DECODE)}
        for phase, (sent, count) in jobs.items():
            seconds = {}
            for engine in (base, other) if turn % 2 else (other, base):
                engine.wake()
                seconds[engine] = engine.ask("base", sent, count)[0]
            ratios.setdefault(f"{phase} {batch}", []).append(seconds[other] / seconds[base])
    return ratios


def one_start(
    kinds: tuple[str, str], model: str, batches: list[int], pairs: int
) -> dict[str, float]:
    """Overhead by phase and batch, the median over pairs, of two engines that were just started."""
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    engines = [Engine(kind, model, {}, cores) for kind in kinds]
    base, other = engines if kinds[0] == "base" else engines[::-1]
    try:
        check(engines, model)
        overhead = {}
        for batch in batches:
            measure(base, other, batch, 1)  # allocations, and shapes not seen before
            for key, ratios in measure(base, other, batch, pairs).items():
                overhead[key] = statistics.median(ratios) - 1
        return overhead
    finally:
        for engine in engines:
            engine.stop()


def summary(starts: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Both orders' medians, averaged; lowest and highest start."""
    found = {}
    for key in starts[0]:
        orders = [[start[key] for start in starts[i::2] if key in start] for i in range(2)]
        found[key] = {
            "middle": statistics.mean(statistics.median(order) for order in orders if order),
            "lowest": min(map(min, filter(None, orders))),
            "highest": max(map(max, filter(None, orders))),
            "starts": sum(map(len, orders)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--add", action="store_true", help="to the starts that are in FILE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    from base_model import ensure_base

    model, other = str(ensure_base()), "base" if args.same else "plugin"
    out = args.out or REPO / f"benchmarks/results/base_requests{'_same' * args.same}.json"
    starts: list[dict[str, float]] = json.loads(out.read_text())["starts"] if args.add else []
    for number in range(len(starts), len(starts) + args.starts):
        kinds = ("base", other) if number % 2 else (other, "base")
        starts.append(one_start(kinds, model, batches, args.pairs))
        line = ", ".join(f"{key} {value:+.1%}" for key, value in starts[-1].items())
        print(f"start {number + 1}: {line}", flush=True)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__, "compared": f"{other} with base", "pairs": args.pairs,
            "overhead": summary(starts), "starts": starts,
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    for key, of in summary(starts).items():
        print(f"{key:>11}: {of['middle']:+.1%} ({of['lowest']:+.1%} to {of['highest']:+.1%})")


if __name__ == "__main__":
    main()
