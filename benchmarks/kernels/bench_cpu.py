"""The CPU op: compiled kernels against the PyTorch path and the byte floor, per decode step.

    python benchmarks/kernels/bench_cpu.py [--models smollm2,llama1b] [--tokens 1,8,32,256]

For every model, kind of adapter and number of tokens: the time of all sites of a model's layers,
called one after the other as a step calls them, so that no weight is found in a cache. Both paths
take turns, and the best round of each counts: other work on the machine only adds. The floor is
the time in which the same threads read the weights that the tokens need (no more than the step
holds: chosen experts, and all routers).

Both paths are held against the reference before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO)]

from tests.make_adapters import normal  # noqa: E402
from vllm_lora_ext.adapters.model import RoutedModule  # noqa: E402
from vllm_lora_ext.kernels.gated_lora import (  # noqa: E402
    Site,
    StepMap,
    gated_lora_,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native  # noqa: E402
from vllm_lora_ext.routing import GateSpec  # noqa: E402


class Model(NamedTuple):
    """(in features, out features of each slice) of a layer's fused linears, and how many layers."""

    sites: tuple[tuple[int, tuple[int, ...]], ...]
    layers: int


MODELS = {
    "smollm2": Model(
        ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))), 30
    ),
    "llama1b": Model(
        ((2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)), (8192, (2048,))), 8
    ),
}
KINDS = {
    "plain r=8": (GateSpec(), 8),
    "routed 8/2/8": (
        GateSpec(
            source="router", blocks=(8,) * 8, score="softmax", select="top_k", k=2,
            weight="renormalise",
        ), 64,
    ),
    "rank-wise 64/8": (
        GateSpec(source="router", blocks=(1,) * 64, select="top_k", k=8, weight="softmax"), 64
    ),
    "dense 4 x 8": (GateSpec(source="router", blocks=(8,) * 4, score="softmax"), 32),
}  # fmt: skip


class Layer(NamedTuple):
    site: Site
    number: int
    modules: list[RoutedModule]
    x_TK: torch.Tensor
    y_TN: torch.Tensor


def build(model: Model, kind: str, tokens: int, dtype: torch.dtype) -> list[Layer]:
    """All sites of the model with one adapter in slot 0, and inputs of their own."""
    gate, rank = KINDS[kind]
    rng = np.random.default_rng(0)
    step = StepMap(tokens)
    step.update(np.zeros(tokens, dtype=int))
    layers = []
    for _ in range(model.layers):
        for k, sizes in model.sites:
            modules = [
                RoutedModule(
                    normal(rng, rank, k) / k**0.5, normal(rng, n, rank) * 0.1, gate,
                    normal(rng, gate.num_gates, k) / k**0.5 if gate.num_gates else None,
                )
                for n in sizes
            ]  # fmt: skip
            site = Site(1, k, sizes, rank, max(gate.num_gates, 1), dtype, "cpu")
            site.write(0, modules)
            site.step = step
            x_TK = normal(rng, tokens, k).to(dtype)
            y_TN = torch.zeros(tokens, sum(sizes), dtype=dtype)
            layers.append(Layer(site, register_site(site), modules, x_TK, y_TN))
    return layers


@contextmanager
def compiled(on: bool, layers: list[Layer]) -> Iterator[None]:
    """Inside, the op takes the compiled kernels, or the PyTorch path."""
    before = cpu_native.tables
    if not on:
        cpu_native.tables = lambda *_: None  # type: ignore[assignment]
    for layer in layers:
        layer.site.changed()  # or calls would stay in C++, and not ask
    try:
        yield
    finally:
        cpu_native.tables = before


def step(layers: list[Layer]) -> None:
    for layer in layers:
        gated_lora_(layer.y_TN, layer.x_TK, layer.number)


def check(layers: list[Layer]) -> None:
    for layer in layers[:4]:
        sizes = [m.b_NR.shape[0] for m in layer.modules]
        slots_T = torch.zeros(len(layer.x_TK), dtype=torch.long)
        want = gated_lora_reference(layer.x_TK, slots_T, [layer.modules], sizes)
        limit = 2e-5 if layer.y_TN.dtype is torch.float32 else 1e-2
        for on in (False, True):
            layer.y_TN.zero_()
            with compiled(on, [layer]):
                gated_lora_(layer.y_TN, layer.x_TK, layer.number)
            error = ((layer.y_TN.float() - want).norm() / want.norm()).item()
            if not error < limit:
                raise SystemExit(f"check failed: compiled={on}, relative error {error:.1e}")


def needed_bytes(layers: list[Layer]) -> int:
    """Weights that the tokens need: routers, and A and B of chosen experts."""
    total = 0
    for layer in layers:
        for m in layer.modules:
            used = m.a_RK.shape[0]
            if m.router_GK is not None:
                total += 4 * m.router_GK.numel()
                if m.gate.select == "top_k":
                    u_TG = layer.x_TK.float() @ m.router_GK.t()
                    chosen = u_TG.topk(m.gate.k, dim=1).indices.unique()
                    used = sum(m.gate.blocks[i] for i in chosen.tolist())
            total += 4 * used * (m.a_RK.shape[1] + m.b_NR.shape[0])
    return total


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bandwidth() -> float:
    """Bytes a second that the threads read from memory, at best."""
    data = torch.zeros(32 << 20)  # 128 MiB: more than a cache holds
    return 4 * data.numel() / min(seconds(data.sum) for _ in range(5))


def measure(model: Model, kind: str, tokens: int, dtype: torch.dtype, rounds: int) -> str:
    layers = build(model, kind, tokens, dtype)
    check(layers)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for on in times:
            with compiled(on, layers):
                step(layers)  # the first call makes what the others find
                taken = seconds(lambda: step(layers))
            if turn:  # the first is for warming up
                times[on].append(taken)
    old, new = min(times[False]), min(times[True])
    floor = needed_bytes(layers) / bandwidth()
    calls = len(layers)
    return (
        f"{kind:15} T={tokens:<5} {old / calls * 1e6:9.1f} {new / calls * 1e6:9.1f} "
        f"{floor / calls * 1e6:9.1f}   {old / new:6.2f}x {new / floor:6.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tokens", default="1,8,32,256")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}")
    for name in args.models.split(","):
        print(
            f"\n{name}: {'microseconds per call':>17} PyTorch  compiled     floor   gain  to floor"
        )
        for kind in args.kinds.split(","):
            for tokens in map(int, args.tokens.split(",")):
                dtype = getattr(torch, args.dtype)
                print(measure(MODELS[name], kind, tokens, dtype, args.rounds), flush=True)


if __name__ == "__main__":
    main()
