"""One server, one model of 135 M parameters, three skills, and a router that picks among them.

Starts `vllm serve` with five adapters on one small base model:

    words, date, time     one plain LoRA adapter per task (see examples/tasks.py)
    uniform               the three merged with weights 1/3, the usual way to have "all of them"
    routed                the same three as experts, with a trained router in every linear

and asks all of them, and the base model, held-out questions of every task, all at once. The
routed adapter must come within 3 points of the best single adapter on *every* task, or the
exit status is 1. Everything runs on the CPU; nothing is downloaded beyond PyPI packages.

    python examples/demo.py                  # what `make demo` runs, a few minutes
    python examples/demo.py --items 10       # a quick look
    python examples/demo.py --keep-server --port 8000     # then talk to it yourself

Writes demo.json and demo.png to examples/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from pathlib import Path

from base_model import cache_dir, ensure_base
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from server import ServerError, free_port, running_server, serve_command
from tasks import ADAPTERS, HELD_OUT, TASKS, Item, held_out, is_right
from uniform import ensure_uniform

MODELS = ("base", *TASKS, "uniform", "routed")
ITEMS = 50
AT_ONCE = 24
MAX_TOKENS = 16  # the longest right answer has 12
MARGIN = 3.0  # points that routed may lack of the best single adapter
SHOWN = 0  # which question of each task is shown with all answers
LONGEST = 48  # characters shown of an answer
RESULTS = Path(__file__).parent / "results"

Said = dict[tuple[str, str], list[str]]  # (model, task) -> answers
Accuracy = dict[str, dict[str, float]]  # model -> task -> percent


async def ask_all(url: str, items: dict[str, list[Item]], console: Console) -> Said:
    """Every question to every model, mixed, as the requests of many users are."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    said = {(model, task): [""] * len(items[task]) for model in MODELS for task in TASKS}
    jobs = [(model, task, i) for model, task in said for i in range(len(items[task]))]
    random.Random(0).shuffle(jobs)
    gate = asyncio.Semaphore(AT_ONCE)
    columns = TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("asking", total=len(jobs))

        async def ask(model: str, task: str, i: int) -> None:
            async with gate:
                reply = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": items[task][i].question}],
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                )
            said[model, task][i] = reply.choices[0].message.content or ""
            progress.advance(bar)

        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(ask(*job))
    return said


def score(said: Said, items: dict[str, list[Item]]) -> Accuracy:
    return {
        model: {
            task: 100 * sum(map(is_right, items[task], said[model, task])) / len(items[task])
            for task in TASKS
        }
        for model in MODELS
    }


def shortfalls(accuracy: Accuracy) -> list[str]:
    """A line for every task on which routed is too far under the best single adapter."""
    lines = []
    for task in TASKS:
        best = max(TASKS, key=lambda name: accuracy[name][task])
        gap = accuracy[best][task] - accuracy["routed"][task]
        if gap > MARGIN:
            lines.append(
                f"{task}: routed is {gap:.1f} points under adapter '{best}' "
                f"({accuracy['routed'][task]:.1f} against {accuracy[best][task]:.1f}); "
                f"allowed: {MARGIN:g}"
            )
    return lines


def show(accuracy: Accuracy, count: int, console: Console) -> None:
    table = Table(title=f"right answers, % of {count} held-out questions per task")
    table.add_column("model")
    for task in TASKS:
        table.add_column(task, justify="right")
    table.add_column("worst", justify="right")
    for model, row in accuracy.items():
        style = "bold green" if model == "routed" else None
        cells = [f"{value:.0f}" for value in (*row.values(), min(row.values()))]
        table.add_row(model, *cells, style=style)
    console.print(table)


def show_answers(said: Said, items: dict[str, list[Item]], console: Console) -> None:
    """One question of every task, side by side."""
    table = Table(title="the same questions, six models")
    table.add_column("model")
    for task in TASKS:
        table.add_column(escape(items[task][SHOWN].question))
    for model in MODELS:
        cells = []
        for task in TASKS:
            item, text = items[task][SHOWN], " ".join(said[model, task][SHOWN].split())
            color = "green" if is_right(item, text) else "red"
            cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
            cells.append(f"[{color}]{escape(cut)}[/]")
        table.add_row(model, *cells)
    console.print(table)


def draw(accuracy: Accuracy, count: int, file: Path) -> None:
    """Grouped bars, one group a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"base": "#9aa0a6", "uniform": "#e0a030", "routed": "#1a7f37"}
    singles = iter(("#7fb2e5", "#4a90d9", "#2a5f9e"))
    figure, axes = plt.subplots(figsize=(9, 4), dpi=150)
    width = 0.8 / len(MODELS)
    for m, model in enumerate(MODELS):
        places = [t + (m - (len(MODELS) - 1) / 2) * width for t in range(len(TASKS))]
        color = colors.get(model) or next(singles)
        label = f"adapter {model}" if model in TASKS else model
        heights = [accuracy[model][task] for task in TASKS]
        bars = axes.bar(places, heights, width * 0.92, color=color, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(
        range(len(TASKS)), [f"{task}\n{held_out(task, 1)[0].question}" for task in TASKS]
    )
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("right answers, %")
    axes.set_title(
        f"One SmolLM2-135M server, {count} held-out questions a task, all models in one batch",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(MODELS), loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False,
                fontsize=8, columnspacing=1.2, handlelength=1.2)  # fmt: skip
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def write(said: Said, accuracy: Accuracy, items: dict[str, list[Item]], seconds: float) -> None:
    from importlib.metadata import version

    RESULTS.mkdir(exist_ok=True)
    count = len(next(iter(items.values())))
    report = {
        "items_per_task": count,
        "accuracy_percent": accuracy,
        "asking_seconds": round(seconds, 1),
        "requests": len(said) * count,
        "versions": {name: version(name) for name in ("vllm-lora-ext", "torch", "transformers")},
        "answers": {
            task: [
                {
                    "question": item.question,
                    "right": item.answer,
                    **{model: said[model, task][i] for model in MODELS},
                }
                for i, item in enumerate(items[task])
            ]
            for task in TASKS
        },
    }
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(accuracy, count, RESULTS / "demo.png")


def run(args: argparse.Namespace, console: Console) -> int:
    base = ensure_base(console)
    with console.status("uniform merge of the three adapters"):
        uniform = ensure_uniform()
    adapters = {task: ADAPTERS / task for task in TASKS}
    adapters |= {"uniform": uniform, "routed": ADAPTERS / "routed"}
    port = args.port or free_port()
    items = {task: held_out(task, args.items) for task in TASKS}
    command = serve_command(base, adapters, port)
    begin = time.perf_counter()
    with running_server(command, port, cache_dir() / "demo-server.log", console) as url:
        console.print(f"vllm serve: ready after {time.perf_counter() - begin:.0f} s at {url}")
        begin = time.perf_counter()
        said = asyncio.run(ask_all(url, items, console))
        seconds = time.perf_counter() - begin
        accuracy = score(said, items)
        show(accuracy, args.items, console)
        show_answers(said, items, console)
        write(said, accuracy, items, seconds)
        console.print(f"wrote {RESULTS / 'demo.json'} and {RESULTS / 'demo.png'}")
        if args.keep_server:
            _keep(url, console)
    lines = shortfalls(accuracy)
    for line in lines:
        console.print(f"[red]FAILED[/] {line}")
    if not lines:
        console.print(
            f"[green]OK[/] routed is within {MARGIN:g} points of the best single adapter "
            "on every task"
        )
    return int(bool(lines))


def _keep(url: str, console: Console) -> None:
    body = json.dumps(
        {"model": "routed", "messages": [{"role": "user", "content": "Write in words: 2718"}]}
    )
    console.print("The server stays until Ctrl-C. For example:")
    print(f"  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--items", type=int, default=ITEMS, metavar="N",
        help=f"held-out questions per task, 1 to {HELD_OUT} (default {ITEMS})",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="of the server (default: a free one)")
    parser.add_argument("--keep-server", action="store_true", help="leave it up until Ctrl-C")
    args = parser.parse_args()
    if not 1 <= args.items <= HELD_OUT:
        parser.error(f"--items is {args.items}; allowed: 1 to {HELD_OUT}")
    console = Console()
    # So that the server is ended when this process is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(run(args, console))
    except ServerError as error:
        console.print(f"[red]FAILED[/] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
