"""Puts what `make gpu` has measured into the tables of README.md and kernels/README.md.

    python scripts/gpu/report.py            # write; `make gpu-report`
    python scripts/gpu/report.py --check    # exit code 1 when a page differs

Reads benchmarks/results/gpu/*.json and takes the newest file of each card. Without one the tables
say that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks" / "kernels"))

from aims import AIMS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BEGIN, END = "<!-- gpu: make gpu-report -->", "<!-- end gpu -->"
NOTHING = "not measured"
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = {path: text for path, text in files().items() if path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(options.check and bool(stale))


def files() -> dict[Path, str]:
    """The pages with the text that they must have."""
    results = newest(RESULTS)
    pages = {ROOT / "README.md": serving, ROOT / "kernels" / "README.md": kernels}
    return {path: between(path.read_text("utf-8"), make(results)) for path, make in pages.items()}


def between(page: str, text: str) -> str:
    """The page with `text` between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def newest(folder: Path) -> list[Result]:
    """The last result of each card, by the card's name."""
    by_card: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        result["file"] = path.name
        if result["date"] >= by_card.get(result["card"], result)["date"]:
            by_card[result["card"]] = result
    return [by_card[card] for card in sorted(by_card)]


# --- README.md: what LoRA adds to a server --------------------------------------------------------

KINDS = (
    ("stock", "base", "stock vLLM, base requests with LoRA on"),
    ("stock", "plain16", "stock vLLM, plain LoRA, rank 16"),
    ("stock", "plain32", "stock vLLM, plain LoRA, rank 32"),
    ("plugin", "base", "this plugin, base requests with LoRA on"),
    ("plugin32", "plain16", "this plugin, plain LoRA, rank 16, at stock's settings"),
    ("extended", "plain16", "the same, with `extend_weights` 0.1"),
    ("plugin", "plain16", "this plugin, plain LoRA, rank 16"),
    ("plugin", "plain32", "this plugin, plain LoRA, rank 32"),
    ("plugin", "routed", "this plugin, routed, 8 experts of rank 16, two at work"),
    ("fused", "routed", "the same, with `extend_weights` 0.1 and `fuse_activation`"),
    ("dual", "routed", "the same, with the shrink on a second stream"),
    ("prefetched", "routed", "the same, with `prefetch_weights` too"),
)
DECODES = tuple(f"decode {n}" for n in (1, 8, 32, 64))
PREFILLS = tuple(f"prefill {n}" for n in (2048, 8192))
PHASES = DECODES + PREFILLS
NOT_YET = """
No GPU has run this release yet. On one, [`make gpu`](docs/gpu.md) checks and measures it, on a
model of Llama-3.1-8B's shape, and `make gpu-report` puts the numbers here.
""".strip()


@dataclass(frozen=True)
class Bar:
    """What a server is meant to reach.

    Args:
        value: of the stage's result, None where it was not measured.
        most: whether `limit` is the most, not the least, that is good.
    """

    text: str
    value: Callable[[Any], float | None]
    limit: float
    most: bool = False


def speed(engine: str, kind: str, phases: Sequence[str]) -> Callable[[Any], float | None]:
    """Reads the slowest phase's speed over that of the base engine."""

    def value(servers: Any) -> float | None:
        own = [overhead(servers, engine, kind, phase) for phase in phases]
        known = [1 / (1 + o) for o in own if o is not None]
        return min(known) if len(known) == len(phases) else None

    return value


def later(engine: str, base: str) -> Callable[[Any], float | None]:
    """Reads how many seconds longer an engine starts than the base engine."""

    def value(servers: Any) -> float | None:
        times = [(servers or {}).get(name, {}).get("start_s") for name in (engine, base)]
        return None if None in times else times[0] - times[1]

    return value


BARS = (
    Bar(
        "speed of routed 8/2/16 over base, decode at 1 to 64 requests",
        speed("plugin", "routed", DECODES),
        0.93,
    ),
    Bar("the same, prefill of 2048 and 8192", speed("plugin", "routed", PREFILLS), 0.90),
    Bar(
        "speed of plain LoRA of rank 16 over base, decode at 1 to 64",
        speed("plugin", "plain16", DECODES),
        0.95,
    ),
    Bar("the same, prefill of 2048 and 8192", speed("plugin", "plain16", PREFILLS), 0.90),
    Bar(
        "speed of base requests with LoRA on, decode at 1 to 64",
        speed("plugin", "base", DECODES),
        0.985,
    ),
    Bar("seconds that a first start takes longer", later("plugin", "base"), 60, most=True),
    Bar("seconds that a second start takes longer", later("plugin-2", "base-2"), 10, most=True),
)


def overhead(servers: Any, engine: str, kind: str, phase: str) -> float | None:
    """(time - base time) / base time, medians over rounds."""
    seconds = [((servers or {}).get(name) or {}).get("seconds", {}) for name in (engine, "base")]
    own, free = seconds[0].get(kind, {}).get(phase), seconds[1].get("base", {}).get(phase)
    return statistics.median(own) / statistics.median(free) - 1 if own and free else None


def serving(results: list[Result]) -> str:
    """README's section: a table of overheads and one of aims for each card."""
    if not results:
        return f"{NOT_YET}\n\n{bars(None)}"
    return "\n\n".join(
        f"### {title(r)}\n\n{checks(r)} Overhead over vLLM without LoRA,\n(time - base time) / "
        f"base time, medians over rounds:\n\n{overheads(servers(r))}\n\n{bars(servers(r))}"
        for r in results
    )


def overheads(found: Any) -> str:
    heads = ["", *PHASES]
    rows = [heads, ["---"] * len(heads)]
    for engine, kind, text in KINDS:
        cells = [overhead(found, engine, kind, phase) for phase in PHASES]
        rows.append([text, *(NOTHING if c is None else f"{c:+.1%}" for c in cells)])
    return lines(rows)


def bars(found: Any) -> str:
    rows = [["", "aim", "measured"], ["---"] * 3]
    for bar in BARS:
        value = bar.value(found)
        sign = "at most" if bar.most else "at least"
        good = value is not None and (value <= bar.limit if bar.most else value >= bar.limit)
        rows.append([bar.text, f"{sign} {bar.limit:g}", state(value, good)])
    return lines(rows)


# --- kernels/README.md: the kernels' aims ---------------------------------------------------------


def kernels(results: list[Result]) -> str:
    """The table of aims, a column for each card."""
    heads = ["aim on an H100", "at most", *(r["card"] for r in results)]
    rows = [heads if results else [*heads, "state"]]
    rows.append(["---"] * len(rows[0]))
    for aim in AIMS:
        cells = []
        for result in results:
            worst = aim.worst(((stage(result, "bench") or {}).get("rows")) or ())
            cells.append(state(worst, worst is not None and worst <= aim.limit))
        rows.append([aim.text, f"{aim.limit:g}", *(cells or [NOTHING])])
    said = [f"{title(result)}. {checks(result)}" for result in results]
    return "\n\n".join([*said, lines(rows)])


# --- of one result --------------------------------------------------------------------------------


def stage(result: Result, name: str) -> Any:
    return (result["stages"].get(name) or {}).get("result")


def servers(result: Result) -> Any:
    return stage(result, "serve")


def title(result: Result) -> str:
    """Card, driver, versions, and what vLLM resolved: what a number is worth nothing without."""
    v = result["versions"]
    names = (("vLLM", "vllm"), ("torch", "torch"), ("Triton", "triton"), ("CUDA", "cuda"))
    parts = [result["card"], f"driver {result['driver']}" if result["driver"] else ""]
    parts += [f"{name} {v[key]}" for name, key in names if v.get(key)]
    parts += [f"{result['graph_mode']} graphs" if result["graph_mode"] else ""]
    parts += [result["attention_backend"] or "", result["date"]]
    return ", ".join(filter(None, parts))


def checks(result: Result) -> str:
    """A sentence on what was checked, and where the numbers are."""
    said = []
    tests = stage(result, "kernels")
    if tests:
        bad = f", {len(tests['failed'])} failed" if tests["failed"] else ""
        said.append(f"kernel tests: {tests['passed']} passed{bad}")
    engines = stage(result, "engine")
    if engines:
        right = sum(answer["state"] == "right" for answer in engines.values())
        said.append(f"engines: {right} of {len(engines)} as the authors' numbers")
    mode = result["graph_mode"]
    if mode and not mode.startswith("FULL"):
        said.append(f"graphs were {mode}, not full: the aims of decode are not of this")
    if len({s["sources"] for s in result["stages"].values() if s.get("sources")}) > 1:
        said.append("stages are of different sources")
    if servers(result):
        said.append("model of Llama-3.1-8B's shape, random weights, bf16")
    said.append(f"numbers: `benchmarks/results/gpu/{result['file']}`")
    bad = [f"{name} ({s['state']})" for name, s in result["stages"].items() if s["state"] != "ok"]
    if bad:
        said.append("stages that did not end well: " + ", ".join(bad))
    return "; ".join(said) + "."


def state(value: float | None, good: bool) -> str:
    return NOTHING if value is None else f"{value:.3g}, {'met' if good else 'missed'}"


def lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
