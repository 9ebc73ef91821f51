"""Which merge keeps the skills: every method on the demo's three tasks, held-out accuracy.

    python benchmarks/merging_quality.py [--items 60] [--only ties,cat] [--out FILE.json]
    python benchmarks/merging_quality.py --draw      # the plot again, from FILE.json

One offline vLLM engine (CPU, bf16, SmolLM2-135M) serves every result as an ordinary adapter: the
three single ones, the routed one, and the three merged by each method with weight 1. A merge can be
too weak or too strong, so each is measured twice: as the method leaves it (`lambda` 1), and with
the `lambda` that is best on other held-out items (ten a task, never among the measured ones). All
random choices have seed 0. Before anything is measured, the single adapters must repeat the demo's
numbers, and a merged adapter's greedy tokens transformers'; otherwise nothing is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from base_model import ensure_base
from learned_weights import added, learn_soup, search_hub, write_soup
from merging_quality_report import KEYS, draw, show
from tasks import ADAPTERS, HELD_OUT, TASKS, Item, held_out, is_right

from vllm_lora_ext.merging import METHODS, Factors, Term, load_factors, load_soups, merge, save_peft
from vllm_lora_ext.merging.generate import ExpertLibrary, fuse, minilm

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
TUNING = 10  # held-out items a task that choose lambda; the last ones
LAMBDAS = (1 / 3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
MAX_TOKENS, MAX_RANK = 16, 16
TOLERANCE = 5.0  # points that a single adapter may be off the demo's number: bf16, other batches
DESCRIPTIONS = {  # of the experts, and of the tasks by somebody who does not know them
    "words": ("Writes numbers out in English words", "spell this number in letters"),
    "date": ("Writes ISO dates as month, day and year", "say this calendar date in English"),
    "time": ("Turns 24-hour clock times into AM and PM", "what is 16:05 on a twelve-hour clock"),
}

Accuracy = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A method as it is measured.

    Args:
        label: in the table.
        method, parameters: of `merge`.
        weight: of each adapter.
        group: rows of one kind stand together.
    """

    label: str
    group: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


SUM, FACTORS, ENTRIES, BASES, LEARNED = (
    "sum of deltas", "sums of factors", "entries dropped or outvoted", "directions and clusters",
    "learned or generated",
)  # fmt: skip
_FULL = {"rank": MAX_RANK}
ROWS = (
    Row("cat, weights 1/3", SUM, "cat", weight=1 / 3),
    Row("cat, weights 1", SUM, "cat"),
    Row("svd, rank 8", SUM, "svd", {"rank": 8}),
    Row("svd, rank 4", SUM, "svd", {"rank": 4}),
    Row("linear (PEFT)", FACTORS, "linear", {"compat": "peft"}),
    Row("linear (LoRAX)", FACTORS, "linear", {"compat": "lorax"}),
    Row("robustmerge", FACTORS, "robustmerge"),
    Row("ties, core space", ENTRIES, "ties"),
    Row("ties (PEFT)", ENTRIES, "ties", {"compat": "peft"}),
    Row("ties (mergekit), rank 16", ENTRIES, "ties", {"compat": "mergekit", **_FULL}),
    Row("ties (original), rank 16", ENTRIES, "ties", {"compat": "ties_original", **_FULL}),
    Row("knots_ties", ENTRIES, "knots_ties"),
    Row("dare_ties", ENTRIES, "dare_ties"),
    Row("dare_linear", ENTRIES, "dare_linear"),
    Row("magnitude_prune", ENTRIES, "magnitude_prune"),
    Row("della", ENTRIES, "della"),
    Row("della_linear", ENTRIES, "della_linear"),
    Row("breadcrumbs", ENTRIES, "breadcrumbs"),
    Row("breadcrumbs_ties", ENTRIES, "breadcrumbs_ties"),
    Row("iso", BASES, "iso"),
    Row("tsv", BASES, "tsv"),
    Row("cart", BASES, "cart"),
    Row("lego, k = 8", BASES, "lego", {"k": 8}),
    Row("lego, k = 4", BASES, "lego", {"k": 4}),
)


class Bench:
    """The engine, and the questions."""

    def __init__(self, items: int, scratch: Path) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # this process has run torch threads
        }  # fmt: skip
        from transformers import AutoTokenizer
        from vllm import LLM

        self.base, self.scratch = ensure_base(), scratch
        self.ids: dict[Path, int] = {}
        self.test = {task: held_out(task, items) for task in TASKS}
        self.tuning = {task: held_out(task)[-TUNING:] for task in TASKS}
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.llm = LLM(
            model=str(self.base), dtype="bfloat16", max_model_len=256, max_num_seqs=64, seed=0,
            block_size=32, enable_lora=True, max_loras=1, max_lora_rank=MAX_RANK,
            disable_log_stats=True,
        )  # fmt: skip

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def save(self, factors: Factors) -> Path:
        return save_peft(factors, Path(tempfile.mkdtemp(dir=self.scratch)) / "adapter")

    def ask(self, folder: Path | None, items: list[Item]) -> list[Any]:
        """Greedy answers, all in one batch."""
        from smollm import prompt_ids
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = None
        if folder is not None:
            number = self.ids.setdefault(folder, len(self.ids) + 1)
            adapter = LoRARequest(f"adapter-{number}", number, str(folder))
        prompts = [{"prompt_token_ids": prompt_ids(self.tokenizer, i.question)} for i in items]
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        outputs = self.llm.generate(prompts, params, lora_request=adapter, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def accuracy(self, folder: Path | None, items: Mapping[str, list[Item]]) -> Accuracy:
        """Per cent right, by task."""
        flat = [item for of_task in items.values() for item in of_task]
        said = iter(self.ask(folder, flat))
        return {
            task: 100 * sum(is_right(item, next(said).text) for item in of_task) / len(of_task)
            for task, of_task in items.items()
        }

    def measured(self, folder: Path | None) -> Accuracy:
        return self.accuracy(folder, self.test)


def check(bench: Bench, adapters: Mapping[str, Factors], singles: Mapping[str, Accuracy]) -> None:
    """Raises SystemExit where the engine does not repeat what is known."""
    demo = json.loads((REPO / "examples/results/demo.json").read_text())["accuracy_percent"]
    for name, row in singles.items():
        worst = max(abs(row[task] - demo[name][task]) for task in TASKS)
        if worst > TOLERANCE:
            raise SystemExit(f"check failed: '{name}' is {worst:.0f} points off the demo's number")
    merged = merge("cat", [Term(f, 1 / 3) for f in adapters.values()]).factors
    items = [bench.test[task][i] for task in TASKS for i in range(2)]
    said = bench.ask(bench.save(merged), items)
    for item, out in zip(items, said, strict=True):
        gap = _gap(merged, item, list(out.token_ids))
        if gap > 0.25:
            raise SystemExit(f"check failed: {item.question}: {out.text}: logit gap {gap:.2f}")
    print("check passed: single adapters repeat the demo, a merged one transformers", flush=True)


@torch.inference_mode()
def _gap(factors: Factors, item: Item, answer: list[int]) -> float:
    """How much likelier transformers' token is where the engine's answer first leaves it."""
    from smollm import load, prompt_ids

    model, tokenizer = load()
    pairs = factors.modules
    ids = prompt_ids(tokenizer, item.question)
    with added(model, list(pairs), lambda name, x: x @ pairs[name].a_RK.T @ pairs[name].b_NR.T):
        logits_TV = model(torch.tensor([ids + answer])).logits[0].float()
    for step, token in enumerate(answer):
        logits_V = logits_TV[len(ids) - 1 + step]
        gap = float(logits_V.max() - logits_V[token])
        if gap:
            return gap
    return 0.0


def tuned(bench: Bench, merged: Any) -> tuple[float, Path]:
    """The lambda that is best on the tuning items; among equals the one next to 1."""
    found: dict[float, tuple[float, Path]] = {}
    for strength in LAMBDAS:
        folder = bench.save(merged(strength))
        score = sum(bench.accuracy(folder, bench.tuning).values())
        found[strength] = (score, folder)
    best = max(LAMBDAS, key=lambda s: (found[s][0], -abs(s - 1)))
    return best, found[best][1]


def scaled(factors: Factors, strength: float) -> Factors:
    terms = [Term(factors, 1.0)]
    return merge("cat", terms, {"lambda": strength}).factors


def references(bench: Bench) -> Iterator[dict[str, Any]]:
    """Nothing merged: the base, the three adapters, the routed one."""
    for name in ("base", *TASKS, "routed"):
        row = bench.measured(None if name == "base" else ADAPTERS / name)
        label = name if name in ("base", "routed") else f"{name} alone"
        yield {"label": label, "group": "not merged", "method": None, "as_it_comes": row}


def merges(
    bench: Bench, adapters: Mapping[str, Factors], rows: Iterable[Row], learned: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every method, and what is learned or generated."""
    jobs: list[tuple[str, str, str, dict[str, Any], Any]] = []
    for row in rows:
        terms = [Term(f, row.weight, name) for name, f in adapters.items()]
        jobs.append((row.label, row.group, row.method, dict(row.parameters), terms))
    if "soup" in learned:
        jobs.append(("soups (learned)", LEARNED, "soups", {}, load_soups(learned["soup"])))
    if "lorahub" in learned:
        hub = [Term(f, w) for f, w in zip(adapters.values(), learned["lorahub"], strict=True)]
        jobs.append(("lorahub (searched)", LEARNED, "lorahub", {}, hub))
    for label, group, method, parameters, terms in jobs:
        factors = merge(method, terms, parameters).factors
        yield _both(bench, label, group, method, parameters, factors)
    third = [1 / len(adapters)] * len(adapters)
    fused = fuse(list(adapters.values()), third).factors
    yield _both(bench, "ICM-Fusion, weights 1/3", LEARNED, "icm_fusion", {}, fused)


def _both(
    bench: Bench, label: str, group: str, method: str, parameters: dict[str, Any], factors: Factors
) -> dict[str, Any]:
    """As the method leaves it, and with the strength that is best elsewhere."""
    strength, folder = tuned(bench, lambda s: scaled(factors, s))
    plain = bench.measured(bench.save(factors))
    return {
        "label": label, "group": group, "method": method, "parameters": parameters,
        "rank": factors.rank, "as_it_comes": plain, "lambda": round(strength, 3),
        "tuned": plain if strength == 1 else bench.measured(folder),
    }  # fmt: skip


def described(bench: Bench) -> dict[str, Any]:
    """SG-LoRA: for each task the adapter that its description gives, asked this task only."""
    texts = {name: (name, text) for name, (text, _) in DESCRIPTIONS.items()}
    embed = minilm()
    library = ExpertLibrary.build(texts, embed, root=ADAPTERS)
    row, weights = {}, {}
    for task, (_, question) in DESCRIPTIONS.items():
        weights[task] = {n: round(w, 3) for n, w in library.select(embed(question), 3).items()}
        folder = bench.save(library.generate(question, embed, k=3))
        row[task] = bench.accuracy(folder, {task: bench.test[task]})[task]
    return {
        "label": "SG-LoRA, by description", "group": LEARNED, "method": "sg_lora",
        "parameters": {"weights": weights}, "as_it_comes": row,
    }  # fmt: skip


def learn(adapters: Mapping[str, Factors], scratch: Path) -> dict[str, Any]:
    """Soups' scalars and LoraHub's weights, from twelve training items a task."""
    scalars = learn_soup(list(adapters.values()))
    folders = write_soup([ADAPTERS / task for task in adapters], scalars, scratch / "soup")
    return {"soup": folders, "lorahub": search_hub(list(adapters.values()))}


def run(args: argparse.Namespace) -> None:
    begin, found = time.perf_counter(), []
    wanted = set(args.only.split(",")) if args.only else {*METHODS, "icm_fusion", "sg_lora"}
    adapters = {task: load_factors(ADAPTERS / task) for task in TASKS}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        learned = learn(adapters, scratch) if wanted & {"soups", "lorahub"} else {}
        bench = Bench(args.items, scratch)
        try:
            for row in references(bench):
                found.append(row)
                _tell(row)
            names = ("base", *TASKS, "routed")
            singles = {n: r["as_it_comes"] for n, r in zip(names, found, strict=True)}
            check(bench, adapters, singles)
            rows = [row for row in ROWS if row.method in wanted]
            for row in merges(bench, adapters, rows, learned):
                found.append(row)
                _tell(row)
                _write(args, found, learned, time.perf_counter() - begin)
            if "sg_lora" in wanted:
                found.append(described(bench))
                _tell(found[-1])
        finally:
            bench.close()
    _write(args, found, learned, time.perf_counter() - begin)


def _tell(row: dict[str, Any]) -> None:
    cells = [" ".join(f"{v:3.0f}" for v in row[k].values()) for k in KEYS if k in row]
    strength = f"lambda {row['lambda']:g}" if "lambda" in row else ""
    print(f"{row['label']:28} {'   '.join(cells)}   {strength}", flush=True)


def _write(
    args: argparse.Namespace, found: list[dict[str, Any]], learned: dict[str, Any], seconds: float
) -> None:
    from importlib.metadata import version

    report = {
        "items_per_task": args.items, "tuning_items_per_task": TUNING, "seed": 0,
        "lambdas": [round(s, 3) for s in LAMBDAS], "seconds": round(seconds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm-lora-ext", "torch", "vllm")},
        "lorahub_weights": learned.get("lorahub"), "rows": found,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    most = HELD_OUT - TUNING
    parser.add_argument("--items", type=int, default=60, help=f"measured, a task; at most {most}")
    parser.add_argument("--only", default="", help="these methods, with commas between")
    parser.add_argument("--draw", action="store_true", help="only table and plot, from --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "merging_quality.json")
    args = parser.parse_args()
    if not 1 <= args.items <= most:
        parser.error(f"--items is {args.items}; allowed: 1 to {most}")
    if not args.draw:
        run(args)
    report = json.loads(args.out.read_text())
    show(report)
    draw(report, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
