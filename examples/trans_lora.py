"""Trans-LoRA (arXiv 2405.17258): moves a LoRA adapter to a new base model, without its data.

    1 synthesise   a base model in vLLM sees five of the task's questions and writes more
    2 filter       a discriminator, a small LoRA trained with the source adapter's own questions,
                   keeps what looks like them
    3 label        source base and source adapter answer what was kept, in vLLM
    4 retrain      a LoRA of the new base learns those questions and answers, with PEFT
    5 serve        the new adapter in vLLM on the new base, on held-out questions

The task's answers are never used, and its questions only by the discriminator, which whoever
trained the source adapter would hand on with it. As in the paper the old base writes what the
discriminator learns to refuse, and the new base writes what the new adapter learns from.

    python examples/trans_lora.py                      # the demo's `date` adapter, see below
    python examples/trans_lora.py --task time
    python examples/trans_lora.py --no-filter          # what the discriminator is good for

The demo's new base is its only chat model without six of its thirty layers (examples/shallow.py).
Your own adapter, base models and questions (one a line):

    python examples/trans_lora.py --source OLD_BASE --adapter ADAPTER --target NEW_BASE \\
        --questions questions.txt --held-out test.jsonl --out adapters/moved

The first eight questions are the seeds, up to 200 more train the discriminator. Each line of
--held-out, for the table at the end, is {"question": ..., "answer": ...}. Everything is seeded. The
demo takes about seven minutes on two cores and writes examples/results/trans_lora.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from base_model import cache_dir, ensure_base
from rich.console import Console
from rich.table import Table
from synthesis import Engine, fresh
from tasks import ADAPTERS, HELD_OUT, TASKS, Item, held_out, is_right, training
from transfer import (
    CHECKED,
    REAL,
    SEED,
    SEEDS,
    Inputs,
    Report,
    discriminator,
    gather,
    label,
    train_lora,
)  # fmt: skip

RESULT = Path(__file__).parent / "results" / "trans_lora.json"


def read_inputs(args: argparse.Namespace) -> Inputs:
    """The demo's, where nothing else is named."""
    real = [item.question for item in training(args.task)] if args.task else []
    if args.questions:
        real = fresh(args.questions.read_text(encoding="utf-8").splitlines(), set())
    if len(real) < SEEDS + 2 * CHECKED:
        raise SystemExit(f"{len(real)} different questions; at least {SEEDS + 2 * CHECKED} wanted")
    test = held_out(args.task) if args.task else []
    if args.held_out:
        lines = args.held_out.read_text(encoding="utf-8").splitlines()
        test = [Item(row["question"], row["answer"]) for row in map(json.loads, lines)]
    if args.target is None:
        from shallow import ensure_shallow

        args.target = ensure_shallow()
    return Inputs(
        args.source or ensure_base(), args.adapter or ADAPTERS / args.task, args.target,
        real[: SEEDS + REAL], test[: args.items],
    )  # fmt: skip


def rank_of(adapter: Path) -> int:
    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]


def measure(
    inputs: Inputs, engine: Engine, adapter: Path | None, max_tokens: int
) -> dict[str, Any]:
    """Held-out accuracy in per cent, or why the adapter is not served."""
    from vllm_lora_ext.errors import AdapterError

    try:
        said = engine.answers([i.question for i in inputs.test], adapter, max_tokens)
    except AdapterError as error:
        return {"accuracy": None, "refused": error.text, "code": error.code}
    pairs = list(zip(inputs.test, said, strict=True))
    wrong = [[item.question, text] for item, text in pairs if not is_right(item, text or "")]
    right = 100 * (1 - len(wrong) / len(pairs))
    return {"accuracy": round(right, 1), "wrong_examples": wrong[:8]}


def compare(
    inputs: Inputs, source: Engine, target: Engine, moved: Path, work: Path, max_tokens: int
) -> dict[str, dict[str, Any]]:
    """Every row of the table."""
    removed = json.loads((inputs.target / "config.json").read_text()).get("removed_layers")
    cases = {
        "old base alone": (source, None),
        "old base, source adapter": (source, inputs.adapter),
        "new base alone": (target, None),
        "new base, source adapter as it is": (target, inputs.adapter),
    }
    if removed:
        from shallow import renumber

        left = renumber(inputs.adapter, removed, work / "renumbered")
        cases["new base, source adapter's remaining layers"] = (target, left)
    cases["new base, transferred adapter"] = (target, moved)
    return {name: measure(inputs, *case, max_tokens) for name, case in cases.items()}


def show(rows: dict[str, dict[str, Any]], count: int, console: Console) -> None:
    table = Table(title=f"right answers, % of {count} held-out questions (vLLM)")
    table.add_column("served")
    table.add_column("right", justify="right")
    for name, row in rows.items():
        cell = f"does not fit ({row['code']})" if "code" in row else f"{row['accuracy']:.1f}"
        table.add_row(name, cell, style="bold green" if "transferred" in name else None)
    console.print(table)


def run(args: argparse.Namespace, console: Console) -> None:
    inputs, report = read_inputs(args), Report(console)
    rank = max(8, 1 << (rank_of(inputs.adapter) - 1).bit_length())  # vLLM takes powers of two
    work = args.out or cache_dir() / f"trans-lora-{args.task or inputs.adapter.name}"
    with contextlib.ExitStack() as stack:
        with console.status("starting vLLM, on the old base and on the new one"):
            source = stack.enter_context(Engine(inputs.source, rank, SEED))
            target = stack.enter_context(Engine(inputs.target, rank, SEED))
        report.note("engines", f"vLLM serves {inputs.source.name} and {inputs.target.name}")
        judge = discriminator(inputs, source, work, report) if args.filter else None
        writer = target if args.writer == "target" else source
        questions = gather(inputs, writer, source, judge, args.pairs, report)
        pairs = label(inputs, source, questions, args.max_tokens, work / "pairs.jsonl", report)
        moved = train_lora(
            inputs.target, pairs, inputs.adapter, work / "adapter", args.steps, args.rate, "adapter"
        )
        report.note("retrained", f"{args.steps} steps on the new base, into {moved}")
        rows = compare(inputs, source, target, moved, work, args.max_tokens) if inputs.test else {}
    report.note("measured", f"{len(inputs.test)} held-out questions", accuracy_percent=rows)
    if rows:
        show(rows, len(inputs.test), console)
    write(args, inputs, report)


def write(args: argparse.Namespace, inputs: Inputs, report: Report) -> None:
    from importlib.metadata import version

    target = json.loads((inputs.target / "config.json").read_text())
    known = ("num_hidden_layers", "removed_layers", "perplexity_before_after")
    head = {
        "task": args.task, "filter": args.filter, "writer": args.writer, "seed": SEED,
        "pairs_wanted": args.pairs, "steps": args.steps, "rate": args.rate, "seeds": inputs.seeds,
        "source": inputs.source.name, "target": inputs.target.name,
        "target_config": {key: target[key] for key in known if key in target},
        "versions": {n: version(n) for n in ("vllm-lora-ext", "vllm", "torch", "peft")},
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(head | report.data, indent=1) + "\n", encoding="utf-8")
    report.console.print(f"wrote {args.json}")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    given = parser.add_argument_group("what is moved")
    given.add_argument("--task", choices=list(TASKS), help="of the demo (date)")
    given.add_argument("--source", type=Path, metavar="DIR", help="old base model")
    given.add_argument("--adapter", type=Path, metavar="DIR", help="its LoRA adapter, from PEFT")
    given.add_argument(
        "--target", type=Path, metavar="DIR", help="new base model (the demo's: made)"
    )
    given.add_argument("--questions", type=Path, metavar="FILE", help="the task's, one a line")
    given.add_argument("--held-out", type=Path, metavar="FILE", help="JSON lines to measure with")
    add("--pairs", type=int, default=500, help="questions and answers to train on (%(default)s)")
    add("--no-filter", dest="filter", action="store_false", help="keep every different question")
    add("--writer", choices=("target", "source"), default="target", help="base that writes them")
    add("--steps", type=int, default=90, help="of the new adapter's training (%(default)s)")
    add("--rate", type=float, default=3e-3, help="its learning rate (%(default)s)")
    add("--items", type=int, default=HELD_OUT, help="held-out questions (%(default)s)")
    add("--max-tokens", type=int, default=32, help="of an answer (%(default)s)")
    add("--out", type=Path, metavar="DIR", help="for the adapters (default: the demo's cache)")
    add("--json", type=Path, metavar="FILE", default=RESULT, help="for the figures")
    args = parser.parse_args(words)
    own = [args.source, args.adapter, args.questions]
    if any(own) and (args.task or not args.target or not all(own)):
        parser.error("--source, --adapter, --target and --questions go together, without --task")
    if not any(own):
        args.task = args.task or "date"
    return args


if __name__ == "__main__":
    try:
        run(parse_args(), Console())
    except KeyboardInterrupt:
        sys.exit(130)
