"""Weights of a merge, learned from a few examples on a CPU: LoRA Soups' and LoraHub's.

    python benchmarks/learned_weights.py OUT_DIR     # a LoRA Soups run of the demo's adapters

LoRA Soups (https://arxiv.org/abs/2410.13025): one scalar per module and adapter, softmax over the
adapters, by gradient descent on the answers' loss. Written as the authors' runs are: the adapters'
folders, a scalar `<module>.lora_learnable_weights` beside each module.
LoraHub (https://arxiv.org/abs/2307.13269): one weight per adapter in [-1.5, 1.5], without
gradients, loss + 0.05 mean |w|; its search (NGOpt) is replaced by a (1+1) evolution strategy.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm import PrefixBatcher, load
from tasks import ADAPTERS, TASKS, Item, training

from vllm_lora_ext.merging import Factors, Term, load_factors, merge

SHOTS = 12  # training items of each task that the weights are learned from
SOUP_STEPS, SOUP_RATE, SOUP_BATCH = 40, 0.1, 4  # batch: items of each task
HUB_TRIES, HUB_LIMIT, HUB_PENALTY = 50, 1.5, 0.05

Hook = Callable[[str, torch.Tensor], torch.Tensor]


def shots(count: int = SHOTS) -> list[list[tuple[int, Item]]]:
    """The first `count` training items of every task, each with the task's number."""
    return [[(i, item) for item in training(task)[:count]] for i, task in enumerate(TASKS)]


@contextlib.contextmanager
def added(model: Any, names: Sequence[str], delta: Hook) -> Iterator[None]:
    """`delta(name, x)` on top of every named linear's output."""

    def hook(name: str) -> Any:
        return lambda layer, args, y: y + delta(name, args[0].float()).to(y.dtype)

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def learn_soup(adapters: Sequence[Factors], steps: int = SOUP_STEPS) -> list[dict[str, float]]:
    """Per adapter: module → scalar; the weights are their softmax over the adapters."""
    torch.manual_seed(0)
    model, tokenizer = load()
    batcher, pools = PrefixBatcher(tokenizer), shots()
    names = sorted(adapters[0].modules)
    row = {name: i for i, name in enumerate(names)}
    scalar_ME = torch.zeros(len(names), len(adapters), requires_grad=True)
    a = {n: torch.cat([f.modules[n].a_RK for f in adapters]) for n in names}
    b = {n: torch.cat([f.modules[n].b_NR for f in adapters], dim=1) for n in names}
    ranks = {n: torch.tensor([f.modules[n].rank for f in adapters]) for n in names}

    def delta(name: str, x: torch.Tensor) -> torch.Tensor:
        p_R = scalar_ME[row[name]].softmax(0).repeat_interleave(ranks[name])
        return ((x @ a[name].T) * p_R) @ b[name].T

    optimizer = torch.optim.Adam([scalar_ME], lr=SOUP_RATE)
    with added(model, names, delta):
        for step in range(steps):
            start = step * SOUP_BATCH % SHOTS
            batch = batcher.batch([x for pool in pools for x in pool[start : start + SOUP_BATCH]])
            loss = batcher.loss(model, batch, batcher.prefix_cache(model))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                print(f"soup: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    table = scalar_ME.detach().tolist()
    return [{n: table[row[n]][e] for n in names} for e in range(len(adapters))]


def write_soup(
    folders: Sequence[Path], scalars: Sequence[Mapping[str, float]], out: Path
) -> list[Path]:
    """The folders of a LoRA Soups run: `adapter_<i>` with the learned scalars beside the rest."""
    written = []
    for i, (folder, table) in enumerate(zip(folders, scalars, strict=True)):
        where = out / f"adapter_{i}"
        where.mkdir(parents=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        for module, value in table.items():
            tensors[f"base_model.model.{module}.lora_learnable_weights"] = torch.tensor([value])
        save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(folder / "adapter_config.json", where)
        written.append(where)
    return written


def search_hub(adapters: Sequence[Factors], tries: int = HUB_TRIES) -> list[float]:
    """One weight per adapter for method `lorahub`."""
    model, tokenizer = load()
    batcher = PrefixBatcher(tokenizer)
    batch = batcher.batch([x for pool in shots() for x in pool])
    names = sorted(adapters[0].modules)

    @torch.inference_mode()
    def loss(weights: torch.Tensor) -> float:
        terms = [Term(f, float(w)) for f, w in zip(adapters, weights, strict=True)]
        pairs = merge("lorahub", terms).factors.modules
        with added(model, names, lambda name, x: x @ pairs[name].a_RK.T @ pairs[name].b_NR.T):
            found = batcher.loss(model, batch, batcher.prefix_cache(model))
        return float(found) + HUB_PENALTY * float(weights.abs().mean())

    draw = torch.Generator().manual_seed(0)
    best, width = torch.full((len(adapters),), 0.5), 0.5
    lowest = loss(best)
    for attempt in range(tries):
        step = width * torch.randn(len(adapters), generator=draw)
        other = (best + step).clamp(-HUB_LIMIT, HUB_LIMIT)
        seen = loss(other)
        # The one-fifth rule: wider after a hit, narrower after a miss.
        width *= 1.5 if seen < lowest else 0.9
        if seen < lowest:
            best, lowest = other, seen
        if attempt % 10 == 9:
            print(f"lorahub: try {attempt + 1}/{tries}, loss {lowest:.3f}", flush=True)
    return [round(float(w), 4) for w in best]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder for the run")
    parser.add_argument("--steps", type=int, default=SOUP_STEPS)
    args = parser.parse_args()
    folders = [ADAPTERS / task for task in TASKS]
    scalars = learn_soup([load_factors(folder) for folder in folders], args.steps)
    for folder in write_soup(folders, scalars, args.out):
        print(folder)


if __name__ == "__main__":
    main()
