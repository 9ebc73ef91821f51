"""Trains one adapter of a system on two tasks at once, on the CPU, in minutes each.

    python examples/train_system.py --system loramoe      # into build/trained/loramoe/
    python examples/train_system.py                       # every system

The routed systems are the modules of `examples/train/`: the authors' formula in plain PyTorch and
the authors' file format. Plain LoRA and DoRA are PEFT's own. All have the same number of ranks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig
from smollm import BASE_NAME, LINEARS, answers, load
from tasks import Item, held_out, is_right, training
from train import SYSTEMS, Adapted
from train.adapted import ALPHA, EXPERTS, RANK
from train_adapters import fit, save, with_lora

OUT = Path(__file__).resolve().parent.parent / "build" / "trained"
PEFT = {"plain": {}, "dora": {"use_dora": True}}
NAMES = (*PEFT, *SYSTEMS)
LEARNED = ("date", "words")
FIRST_LAYER = 20  # of 30
STEPS = 60
RATE = 3e-3
SEED = 7


def train(name: str, steps: int = STEPS, out: Path = OUT):
    """The trained adapter on its model, and the tokenizer; it is saved in `out/name`."""
    torch.manual_seed(SEED)
    model, tokenizer = load()
    layers = range(FIRST_LAYER, model.config.num_hidden_layers)
    if name in PEFT:
        ranks = {"r": EXPERTS * RANK, "lora_alpha": EXPERTS * ALPHA}
        config = LoraConfig(target_modules=list(LINEARS), **ranks, **PEFT[name])
        adapted = with_lora(model, config, layers)
    else:
        adapted = Adapted(model, SYSTEMS[name], layers)
    fit(adapted, tokenizer, mixed(), steps=steps, rate=RATE, label=name)
    adapted.eval()
    if name in PEFT:
        save(adapted, out / name, BASE_NAME)
    else:
        adapted.save(out / name, BASE_NAME)
    return adapted, tokenizer


def mixed() -> list[tuple[int, Item]]:
    """As many items of each task."""
    items = [training(task) for task in LEARNED]
    count = min(map(len, items))
    return [(i, item) for i, own in enumerate(items) for item in own[:count]]


def questions(count: int) -> dict[str, list[Item]]:
    """Held-out items by task, `count` of each."""
    return {task: held_out(task, count) for task in LEARNED}


def right(model, tokenizer, items: list[Item]) -> int:
    """How many the model answers as it should, greedily, in transformers."""
    said = answers(model, tokenizer, [item.question for item in items])
    return sum(map(is_right, items, said))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", choices=NAMES, action="append", help="only this one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--items", type=int, default=30, help="held-out items a task to report on")
    args = parser.parse_args()
    for name in args.system or NAMES:
        start = time.perf_counter()
        adapted, tokenizer = train(name, args.steps, args.out)
        seconds = time.perf_counter() - start
        for task, items in questions(args.items).items():
            score = right(adapted.get_base_model(), tokenizer, items)
            print(f"{name}: {task} {score}/{len(items)} held-out right")
        print(f"{name}: {args.out / name}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
