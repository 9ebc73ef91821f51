"""Trains one PEFT LoRA adapter per task, on the CPU, in a few minutes each.

    python examples/train_adapters.py                # all tasks, into examples/adapters/<task>/
    python examples/train_adapters.py --task date    # one of them

The adapters touch all seven linears of the upper layers only: the lower half then needs no
backward pass, and the files stay small. Half of the steps see the shared opening of the
conversation (system prompt) as the base model reads it, not as the adapter does: tokens that
are the same for every task carry no hint, a router cannot know the expert yet, so an expert
must not depend on having been there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from smollm import BASE_NAME, LINEARS, PrefixBatcher, answers, epochs, load
from tasks import ADAPTERS, TASKS, Item, held_out, is_right, training

RANK = 4
ALPHA = 8
FIRST_LAYER = 14  # of 30
STEPS = {"words": 90, "date": 40, "time": 140}
BATCH = 24
RATE = {"words": 2e-3, "date": 3e-3, "time": 2e-3}
WARMUP = 5
SEED = 7


def train(task: str, steps: int) -> Path:
    torch.manual_seed(SEED)
    model, tokenizer = load()
    layers = range(FIRST_LAYER, model.config.num_hidden_layers)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS))
    peft_model = with_lora(model, config, layers)
    items = [(0, item) for item in training(task)]
    fit(peft_model, tokenizer, items, steps=steps, rate=RATE[task], label=task)
    save(peft_model, ADAPTERS / task, BASE_NAME)
    _report(peft_model, tokenizer, task)
    return ADAPTERS / task


def with_lora(model, config: LoraConfig, layers: Iterable[int]):
    """The model with a fresh adapter on these layers."""
    config.layers_to_transform, config.task_type = list(layers), "CAUSAL_LM"
    return get_peft_model(model, config)


def fit(
    peft_model, tokenizer, items: list[tuple[int, Item]], *, steps: int, rate: float, label: str
) -> None:
    """Trains the adapter on the items' answers, with a progress bar."""
    batcher = PrefixBatcher(tokenizer)
    model = peft_model.get_base_model()
    weights = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=min(0.5, WARMUP / steps)
    )
    batches = epochs(items, BATCH, SEED)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task(label, total=steps)
        for step in range(steps):
            batch = batcher.batch(next(batches))
            if step % 2:
                cache = batcher.prefix_cache(model)
            else:
                with peft_model.disable_adapter(), torch.no_grad():
                    cache = batcher.prefix_cache(model)
            loss = batcher.loss(model, batch, cache)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(bar, advance=1, description=f"{label}  loss {loss.item():.3f}")


def save(peft_model, folder: Path, base_name: str) -> None:
    """The adapter as a PEFT folder of 16-bit weights."""
    peft_model.peft_config["default"].base_model_name_or_path = base_name  # not a local path
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    _halve(folder / "adapter_model.safetensors")
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card


def _halve(file: Path) -> None:
    """16 bits are what the server computes with; the file is half as large."""
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _report(model, tokenizer, task: str) -> None:
    items = held_out(task, 60)
    said = answers(model, tokenizer, [item.question for item in items])
    right = sum(map(is_right, items, said))
    print(f"{task}: {right}/{len(items)} held-out right")
    for item, text in zip(items, said, strict=True):
        if not is_right(item, text):
            print(f"    {item.question!r}: {text!r}, not {item.answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), action="append", help="only this one")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    args = parser.parse_args()
    for task in args.task or TASKS:
        start = time.perf_counter()
        folder = train(task, args.steps or STEPS[task])
        print(f"{task}: {folder}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
