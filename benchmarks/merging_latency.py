"""What merging by name costs the neighbours: time between their tokens, with and without merges.

    python benchmarks/merging_latency.py [--rounds 3] [--seconds 8] [--out FILE.json]

One server (SmolLM2-135M, bf16, CPU) streams answers to `--streams` clients all the time. In turn,
for some seconds each:

    quiet    nothing else
    known    one more client asks an adapter that is loaded, one token at a time
    merge    that client asks a mix that nobody has asked before, so that each answer is a merge of
             three adapters, a load into a slot, and a token

The difference of `merge` and `known` is what merging costs the others. Before anything is timed, a
mix of one adapter must answer as that adapter; otherwise nothing is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "examples")]
OUT = REPO / "benchmarks" / "results" / "merging_latency.json"
SLOTS = 4


class Streams:
    """Clients that read tokens without a pause; `gaps` holds (when, seconds since the last)."""

    def __init__(self, client: Any, count: int) -> None:
        self.gaps: list[tuple[float, float]] = []
        self._client, self._stop = client, threading.Event()
        names = itertools.cycle(["base", "words"])
        self._threads = [
            threading.Thread(target=self._read, args=(name, i), daemon=True)
            for i, name in zip(range(count), names, strict=False)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _read(self, model: str, seed: int) -> None:
        for turn in itertools.count():
            stream = self._client.completions.create(
                model=model, prompt=f"Story {seed}.{turn}:", max_tokens=200, temperature=0,
                stream=True, extra_body={"ignore_eos": True},
            )  # fmt: skip
            last = None  # the first token waits for the prompt
            for _ in stream:
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
                if self._stop.is_set():
                    stream.close()
                    return


def phase(streams: Streams, seconds: float, work: Callable[[], None] | None) -> dict[str, Any]:
    """The neighbours' gaps, and the seconds of each piece of work beside them."""
    begin, took = time.perf_counter(), []
    while time.perf_counter() - begin < seconds:
        if work is None:
            time.sleep(seconds)
            break
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    end = time.perf_counter()
    gaps = [gap for when, gap in streams.gaps if begin <= when <= end]
    return {"gaps": gaps, "took": took}


def numbers(gaps: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(gaps, n=100)
    return {"median": statistics.median(gaps), "p95": cuts[94], "p99": cuts[98], "max": max(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    from base_model import ensure_base
    from openai import OpenAI
    from rich.console import Console
    from server import free_port, running_server, serve_command
    from tasks import ADAPTERS, TASKS

    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        settings = {"lora_ext": {"merge": {"store": f"{scratch}/store"}}}
        command = serve_command(ensure_base(), {name: ADAPTERS / name for name in TASKS}, port)
        command += ["--max-loras", str(SLOTS), "--additional-config", json.dumps(settings)]
        with running_server(command, port, Path(scratch) / "log", Console()) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
            found = measure(client, args.streams, args.rounds, args.seconds)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "streams": args.streams,
        "rounds": args.rounds, "seconds": args.seconds, **found,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)


def measure(client: Any, count: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Ratios to `quiet` of the same run; and how long a new mix takes, beside a known adapter."""

    def ask(model: str, prompt: str = "Say 17:", n: int = 1) -> str:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=n, temperature=0, seed=0
        )
        return str(answer.choices[0].text)

    if ask("cat:words", n=12) != ask("words", n=12):
        raise SystemExit("check failed: a mix of one adapter does not answer as the adapter")
    weights = itertools.count(1)

    def merge() -> None:
        w = next(weights) / 100
        ask(f"svd[r=16]:date*0.5+time*{w}+words*0.3")

    merge()  # the merging process starts with the first
    kinds: dict[str, Callable[[], None] | None] = {
        "quiet": None, "known": lambda: void(ask("date")), "merge": merge,
    }  # fmt: skip
    gaps: dict[str, list[float]] = {kind: [] for kind in kinds}
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    streams = Streams(client, count)
    time.sleep(3)
    for _ in range(rounds):
        for kind, work in kinds.items():
            one = phase(streams, seconds, work)
            gaps[kind] += one["gaps"]
            took[kind] += one["took"]
    streams.close()
    quiet = numbers(gaps["quiet"])
    ratios = {
        kind: {key: round(value / quiet["median"], 2) for key, value in numbers(gaps[kind]).items()}
        for kind in kinds
    }
    return {
        "token_time_over_quiet_median": ratios,
        "requests": {kind: len(took[kind]) for kind in ("known", "merge")},
        "new_mix_over_known_request": round(
            statistics.median(took["merge"]) / statistics.median(took["known"]), 1
        ),
        "new_mix_seconds": round(statistics.median(took["merge"]), 2),
    }


def void(_: object) -> None:
    return None


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    made = Table("beside the streams", "median", "p95", "p99", "max", box=None)
    for kind, row in report["token_time_over_quiet_median"].items():
        made.add_row(kind, *(f"{value:.2f}" for value in row.values()))
    console = Console()
    console.print("time between a neighbour's tokens, over the median when nothing else runs")
    console.print(made)
    console.print(
        f"a new mix takes {report['new_mix_seconds']} s,"
        f" {report['new_mix_over_known_request']} times a request to a loaded adapter"
    )


if __name__ == "__main__":
    main()
