"""Accuracy on the held-out items with transformers alone, no server: the check while training.

    python examples/evaluate.py                      # every adapter on every task
    python examples/evaluate.py --models routed      # one of them

The adapters go on through `apply_adapter`, the plain reference that the server is held against.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from smollm import answers, load
from tasks import ADAPTERS, HELD_OUT, TASKS, held_out, is_right
from uniform import ensure_uniform

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter

MODELS = ("base", *TASKS, "uniform", "routed")


def folder_of(model: str) -> Path:
    return ensure_uniform() if model == "uniform" else ADAPTERS / model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--items", type=int, default=HELD_OUT, help="held-out items per task")
    parser.add_argument("--misses", action="store_true", help="print the wrong answers")
    args = parser.parse_args()
    torch.manual_seed(0)
    console = Console()
    base, tokenizer = load()
    table = Table(title=f"held-out accuracy, {args.items} items a task (transformers)")
    table.add_column("model")
    for task in TASKS:
        table.add_column(task, justify="right")
    for name in args.models:
        hooks = contextlib.nullcontext()
        if name != "base":
            hooks = apply_adapter(base, load_adapter(folder_of(name)))
        cells = []
        with hooks, console.status(f"asking {name}"):
            for task in TASKS:
                items = held_out(task, args.items)
                said = answers(base, tokenizer, [item.question for item in items])
                right = sum(map(is_right, items, said))
                cells.append(f"{100 * right / len(items):.1f}")
                if args.misses:
                    for item, text in zip(items, said, strict=True):
                        if not is_right(item, text):
                            console.print(f"  {name}: {item.question!r} -> {text!r}")
        console.print(name, *cells)
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
