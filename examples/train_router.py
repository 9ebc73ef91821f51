"""Trains the routers of one routed adapter over the three trained experts, which stay frozen.

    python examples/train_router.py                  # writes examples/adapters/routed/

Every linear has its own router [3, in] and picks two experts per token: softmax over the three
logits, the two largest, renormalised. Two phases:

1. Closed form. The right expert answers each item while every linear's inputs are collected; a
   ridge regression from input to task is that linear's router. Tokens of the shared opening of
   the conversation belong to no task and are asked for equal logits.
2. A few steps of gradient descent on the answers' loss, the routers now choosing for
   themselves, with a small loss that keeps them on the task. This is where the opening's
   tokens learn which mixture serves everybody.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file
from smollm import BASE_NAME, Batch, PrefixBatcher, epochs, load
from tasks import ADAPTERS, TASKS, Item, training
from train_adapters import ALPHA, RANK

from vllm_lora_ext.routing import GateSpec, gate_reference

SPEC = GateSpec(
    source="router",
    blocks=(RANK,) * len(TASKS),
    score="softmax",
    select="top_k",
    k=2,
    weight="renormalise",
)
PROBE_BATCHES = 20
TUNE_STEPS = 20
PER_TASK = 8  # items of each task in a batch
RIDGE = 1e-4  # of the inputs' mean square
SHARPNESS = 12.0  # the regression's targets are 0 and 1; a softmax wants logits further apart
RATE = 1e-3  # relative to the routers' own size
TASK_LOSS = 0.1
SEED = 11


class Experts:
    """The three adapters in one: hooks on the model's linears that add the gated sum."""

    def __init__(self, model, folders: list[Path], spec: GateSpec = SPEC) -> None:
        self.spec = spec
        files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        self.router: dict[str, torch.Tensor] = {}
        for key in sorted(files[0]):
            if not key.endswith(".lora_A.weight"):
                continue
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b_key = key.replace("lora_A", "lora_B")
            self.a[name] = torch.cat([file[key].float() for file in files])
            self.b[name] = torch.cat([file[b_key].float() for file in files], 1) * (ALPHA / RANK)
            model.get_submodule(name).register_forward_hook(self._hook(name))
        self.fixed_BG: torch.Tensor | None = None  # gates from outside, while probing
        self.inputs: dict[str, torch.Tensor] | None = None  # name -> last input, while probing
        self.logits: list[torch.Tensor] = []  # of every linear, the last batch's

    def _hook(self, name: str):
        def add(_, args, y):
            (x,) = args
            if self.inputs is not None:
                self.inputs[name] = x
            if self.fixed_BG is not None:
                g = self.fixed_BG.repeat_interleave(RANK, dim=1)[:, None, :]
            else:
                u = x.float() @ self.router[name].T
                self.logits.append(u)
                g = gate_reference(self.spec, u.flatten(0, 1)).unflatten(0, u.shape[:2])
            delta = ((x.float() @ self.a[name].T) * g) @ self.b[name].T
            return y + delta.to(y.dtype)

        return add


def probe(model, experts: Experts, batcher: PrefixBatcher, batches) -> None:
    """Phase 1: sets the routers by ridge regression."""
    count = len(TASKS)
    moments: dict[str, list[torch.Tensor]] = {}
    experts.inputs = {}
    with Progress() as progress, torch.inference_mode():
        for _ in progress.track(range(PROBE_BATCHES), description="collecting inputs"):
            batch = batcher.batch(next(batches))
            experts.fixed_BG = torch.full((1, count), 1 / count)
            cache = batcher.prefix_cache(model)
            none_PG = torch.zeros(len(batcher.prefix), count)
            # As heavy as one item per task: these tokens come with every item.
            _gather(moments, experts.inputs, None, none_PG, weight=count)
            experts.fixed_BG = F.one_hot(batch.task_B, count).float()
            batcher.loss(model, batch, cache)
            target_BG = experts.fixed_BG - 1 / count
            target_BLG = target_BG[:, None].expand(-1, batch.ids_BL.shape[1], -1)
            _gather(moments, experts.inputs, batch, target_BLG)
    for name, (xx, xy) in moments.items():
        ridge = RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype)
        experts.router[name] = (SHARPNESS * torch.linalg.solve(xx + ridge, xy)).T.float().clone()
    experts.inputs = experts.fixed_BG = None


def _gather(moments, inputs, batch: Batch | None, target, weight: float = 1.0) -> None:
    done: dict[int, list[torch.Tensor]] = {}  # q, k and v share an input; so do gate and up
    for name, x in inputs.items():
        if id(x) not in done:
            x_TK = x[batch.real_BL] if batch else x[0]
            y_TG = target[batch.real_BL] if batch else target
            x_TK, y_TG = x_TK.float(), y_TG.float()
            done[id(x)] = [(weight * (x_TK.T @ x_TK)).double(), (weight * (x_TK.T @ y_TG)).double()]
        sums = moments.setdefault(name, [torch.zeros(()), torch.zeros(())])
        sums[:] = [old + new for old, new in zip(sums, done[id(x)], strict=True)]


def tune(model, experts: Experts, batcher: PrefixBatcher, batches, steps: int) -> None:
    """Phase 2: gradient descent under just the conditions of serving."""
    scale = {name: router.abs().mean().item() for name, router in experts.router.items()}
    steps_by = {name: torch.zeros_like(r, requires_grad=True) for name, r in experts.router.items()}
    start = dict(experts.router)
    optimizer = torch.optim.Adam(steps_by.values(), lr=RATE)
    with Progress() as progress:
        bar = progress.add_task("tuning", total=steps)
        for _ in range(steps):
            batch = batcher.batch(next(batches))
            for name, step in steps_by.items():
                experts.router[name] = start[name] + scale[name] * step
            cache = batcher.prefix_cache(model)
            experts.logits.clear()
            loss = batcher.loss(model, batch, cache)
            task_loss, hits = _task_loss(experts.logits, batch)
            (loss + TASK_LOSS * task_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            text = f"loss {loss.item():.3f}  right expert {hits:.1%}"
            progress.update(bar, advance=1, description=text)
            progress.console.print(text)
    for name, step in steps_by.items():
        experts.router[name] = (start[name] + scale[name] * step).detach()
    experts.logits.clear()


def _task_loss(logits: list[torch.Tensor], batch: Batch) -> tuple[torch.Tensor, float]:
    """Cross entropy of every linear's choice against the item's task; how often it is right."""
    task_BL = batch.task_B[:, None].expand_as(batch.ids_BL)
    task_N = task_BL[batch.real_BL]
    losses, hits = [], []
    for u_BLG in logits:
        u_NG = u_BLG[batch.real_BL]
        losses.append(F.cross_entropy(u_NG, task_N))
        hits.append((u_NG.argmax(-1) == task_N).float().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean().item()


def mixed_batches(seed: int):
    """Batches with the same number of items of every task."""
    streams = [
        epochs([(i, item) for item in training(task)], PER_TASK, seed)
        for i, task in enumerate(TASKS)
    ]
    while True:
        batch: list[tuple[int, Item]] = []
        for stream in streams:
            batch += next(stream)
        yield batch


def save(experts: Experts, folder: Path) -> None:
    from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
    from vllm_lora_ext.adapters.readers.native import write_native

    modules = {
        name: RoutedModule(a, experts.b[name], SPEC, router_GK=experts.router[name])
        for name, a in experts.a.items()
    }
    adapter = RoutedAdapter(modules, system="native", base_model=BASE_NAME)
    write_native(adapter, folder, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=TUNE_STEPS, help="of phase 2")
    parser.add_argument("--out", type=Path, default=ADAPTERS / "routed")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(SEED)
    model, tokenizer = load()
    batcher = PrefixBatcher(tokenizer)
    experts = Experts(model, [ADAPTERS / task for task in TASKS])
    batches = mixed_batches(SEED)
    probe(model, experts, batcher, batches)
    tune(model, experts, batcher, batches, args.steps)
    save(experts, args.out)
    print(f"routed: {args.out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
