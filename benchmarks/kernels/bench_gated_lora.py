"""What a routed LoRA layer costs on a GPU: times, and ratios to stock kernels and to the floors.

    python benchmarks/kernels/bench_gated_lora.py [--models llama-3.1-8b] [--tokens 1,8,64]
        [--cases 8/2/16] [--routing uniform] [--out FILE.json] [--sweep] | --bars | --tiny

Needs torch, triton, numpy and this checkout, nothing else. vLLM's own LoRA kernels are measured too
where vLLM is installed.

One decode layer is four sites (qkv, o, gate/up, down), every token routed at each. A CUDA graph
holds the layer several times over, each time with its own weights and activations, more of them
than the caches hold; the time is that of the graph divided by the layers in it. Before a case is
timed its results are compared with the reference; on a difference it has no time.

--bars measures only what `kernels/README.md` sets aims for, and says which are met. --tiny runs the
code path and the check on small shapes, without a GPU in Triton's interpreter, and measures
nothing. --sweep tries block sizes for each case and prints the best row for `tuning.TABLE`.
`kernels/README.md` says how to read the columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, below

REPO = Path(__file__).resolve().parents[2]
try:
    import vllm_lora_ext
except ImportError:  # not installed: the checkout will do
    sys.path.insert(0, str(REPO))
    import vllm_lora_ext

    sys.path.remove(str(REPO))
if str(REPO) not in map(str, vllm_lora_ext.__path__):
    vllm_lora_ext.__path__.append(str(REPO))  # where kernels/ and routing/ are

sys.path.append(str(Path(__file__).resolve().parent))
from aims import AIMS  # noqa: E402
from decoder_layer import MODELS, Case, Layer, Weights  # noqa: E402

from vllm_lora_ext.kernels.gated_lora import StepMap, prefetch_in_order  # noqa: E402
from vllm_lora_ext.kernels.gated_lora.backends.triton import tuning  # noqa: E402
from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS  # noqa: E402
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE  # noqa: E402

TOKENS = (1, 8, 32, 64, 256, 2048, 8192)
CASES = ("1/1/16", "8/2/8", "8/2/16", "32/2/16", "28/2/8", "rank-wise/64/8")
ROUTING = ("uniform", "skewed", "one-hot")
LAST_LEVEL_CACHE = 128 << 20  # bytes that are surely more than a GPU caches


def graph_time(calls: Sequence[Callable[[], None]], rounds: int = 20) -> float:
    """Seconds of one call, median over replays of a graph that holds all of them."""
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(times[3:])


def launch_floor() -> float:
    """Seconds of one dependent small kernel inside a graph."""
    one = torch.zeros(1, device="cuda")
    return graph_time([lambda: one.add_(1)] * 200)  # type: ignore[list-item, return-value]


def bandwidth() -> float:
    """Bytes per second that a large copy moves, read and write."""
    a, b = (torch.zeros(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * a.nbytes / graph_time([lambda: b.copy_(a)] * 4)  # type: ignore[list-item, return-value]


def floor_bytes(model: str, case: Case, t: int, dense_a: bool) -> float:
    """Bytes that one layer has to move: weights of the experts hit under uniform routing, x once,
    y read and written. `dense_a` counts A of all experts, as two launches must."""
    hit = case.experts * (1 - (1 - case.k / case.experts) ** t)
    total = 0.0
    for k, sizes in MODELS[model]:
        s, n = len(sizes), sum(sizes)
        router = 4 * case.experts * k * s if case.experts > 1 else 0
        a = 2 * (case.experts if dense_a else hit) * case.rank * s * k
        total += a + 2 * hit * case.rank * n + router + 2 * t * k + 4 * t * n
    return total


def stock_calls(model: str, rank: int, t: int, copies: int) -> list[Callable[[], None]] | None:
    """The same layer through vLLM's own shrink and expand, as a plain LoRA of `rank`."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except Exception:  # not there, or one that does not import here: no column is lost but these
        return None
    meta = LoRAKernelMeta.make(1, t, device="cuda")
    meta.prepare_tensors(torch.zeros(t, dtype=torch.int32, device="cuda"))
    args = meta.meta_args(t, False)

    def site(k: int, sizes: tuple[int, ...]) -> Callable[[], None]:
        new = {"dtype": torch.bfloat16, "device": "cuda"}
        a = tuple(torch.randn(1, 1, rank, k, **new) for _ in sizes)  # type: ignore[call-overload]
        b = tuple(torch.randn(1, 1, n, rank, **new) for n in sizes)  # type: ignore[call-overload]
        x_TK, y_TN = torch.randn(t, k, **new), torch.zeros(t, sum(sizes), **new)  # type: ignore[call-overload]

        def call() -> None:
            u = torch.empty(len(sizes), t, rank, dtype=torch.float32, device="cuda")
            lora_shrink(x_TK, a, u, *args, 1.0)
            lora_expand(u, b, y_TN, *args, offset_start=0, add_inputs=True)

        return call

    layers = [[site(k, sizes) for k, sizes in MODELS[model]] for _ in range(copies)]
    return [lambda sites=sites: [s() for s in sites] for sites in layers]  # type: ignore[misc]


def base_weights(model: str, copies: int = 2) -> list[Weights]:
    """Weights of the base layer, each copy larger than the caches."""
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    return [
        [torch.randn(sum(sizes), k, **new) for k, sizes in MODELS[model]]  # type: ignore[call-overload]
        for _ in range(copies)
    ]


def base_call(weights: Weights, x: Weights) -> None:
    for w_NK, x_TK in zip(weights, x, strict=True):
        torch.mm(x_TK, w_NK.t())


def prepare(model: str, case: Case, routing: str, t: int, copies: int | None) -> list[Layer]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = StepMap(t, device, tiled=True)
    step.update(np.zeros(t, dtype=np.int64))
    first = Layer(model, case, routing, t, step)
    error = first.error()
    if error > TOLERANCE[first.dtype]:
        raise SystemExit(f"{model} {case} {routing} T={t}: wrong by {error:.2e}; no times")
    copies = copies or min(64, max(2, -(-2 * LAST_LEVEL_CACHE // first.bytes)))
    return [first, *(Layer(model, case, routing, t, step) for _ in range(copies - 1))]


def measure(
    model: str, name: str, routing: str, t: int, tau: float, speed: float
) -> dict[str, Any]:
    case = Case.parse(name)
    layers = prepare(model, case, routing, t, None)
    seconds = graph_time([layer.run for layer in layers])
    row: dict[str, Any] = {
        "model": model, "case": name, "routing": routing, "tokens": t, "us": seconds * 1e6,
    }  # fmt: skip
    pairs = list(zip(itertools.cycle(base_weights(model)), layers))
    side = torch.cuda.Stream()
    base = graph_time([partial(base_call, w, layer.x) for w, layer in pairs])
    row["of_base"] = seconds / base
    row["added"] = graph_time([partial(layer.run_with_base, w) for w, layer in pairs]) / base - 1
    beside = graph_time([partial(layer.run_beside_base, w, side) for w, layer in pairs])
    row["added_beside"] = beside / base - 1
    row["added_prefetched"] = None
    if t <= MOST_ROWS:  # larger steps fetch nothing
        prefetch_in_order([site for layer in layers for site in layer.sites])
        ahead = [partial(layer.run_beside_base, w, side, prefetches=True) for w, layer in pairs]
        row["added_prefetched"] = graph_time(ahead) / base - 1
    below = [call for w, layer in pairs[:2] if (call := layer.extended(w)) is not None]
    fused, apart = (
        graph_time([layer.gate_up(w, one) for w, layer in pairs[:2]]) for one in (True, False)
    )
    row["fused_of_apart"] = fused / apart
    row["added_extended"] = graph_time(below) / base - 1 if below else None
    for column, rank in (("of_stock_kr", case.k * case.rank), ("of_stock_Er", case.ranks)):
        calls = stock_calls(model, rank, t, len(layers))
        row[column] = None if calls is None else seconds / graph_time(calls)
    row["of_bytes"] = seconds / (floor_bytes(model, case, t, dense_a=False) / speed)
    launches = 2 * len(MODELS[model]) * tau
    row["of_two_launches"] = seconds / max(launches, floor_bytes(model, case, t, True) / speed)
    return row


def sweep(model: str, name: str, routing: str, t: int) -> None:
    """Tries block sizes, one launch after the other, and prints the best row."""
    layers = prepare(model, Case.parse(name), routing, t, None)
    table, tiles = dict(tuning.TABLE), (16,) if t <= 64 else (16, 64)
    now = next(row for row in table[""] if t <= row.max_tokens)
    shrinks = itertools.product(tiles, (16, 32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
    expands = itertools.product(tiles, (32, 64, 128, 256), (64, 256, 1024), (1, 2, 3))
    options: dict[str, Any] = {
        "shrink": itertools.starmap(tuning.Shrink, shrinks),
        "expand": itertools.starmap(tuning.Expand, expands),
    }
    best: dict[str, Any] = {"shrink": now.shrink, "expand": now.expand}
    fastest = float("inf")
    for kind, candidates in options.items():
        for candidate in candidates:
            seconds = _time_with(tuning.Row(tuning.LARGEST, **{**best, kind: candidate}), layers)
            if seconds < fastest:
                fastest, best[kind] = seconds, candidate
    _time_with(tuning.Row(tuning.LARGEST, **best), layers)
    for y_TN in layers[0].y:
        y_TN.zero_()
    error = layers[0].error()
    if error > TOLERANCE[layers[0].dtype]:
        raise SystemExit(f"the best block sizes are wrong by {error:.2e}: {best}")
    tuning.TABLE.clear()
    tuning.TABLE.update(table)
    tuning.blocks.cache_clear()
    print(f"Row({t}, {best['shrink']}, {best['expand']})  # {fastest * 1e6:.1f} us a layer")


def _time_with(row: tuning.Row, layers: list[Layer]) -> float:
    tuning.TABLE.clear()
    tuning.TABLE[""] = (row,)
    tuning.blocks.cache_clear()
    try:
        return graph_time([layer.run for layer in layers], rounds=5)
    except Exception as error:
        if "out of resource" not in str(error):  # this GPU cannot hold these blocks
            raise
        return float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(m for m in MODELS if m != "tiny"))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--routing", default=",".join(ROUTING))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tiny:
        return tiny()
    if not torch.cuda.is_available():
        print("needs a CUDA GPU; --tiny checks the code without one", file=sys.stderr)
        return 2
    if args.bars:
        args.models, args.routing = "llama-3.1-8b", "uniform"
        args.cases, args.tokens = "8/2/16,1/1/16", "1,8,32,64,8192"
    runs = list(
        itertools.product(
            args.models.split(","), args.cases.split(","), args.routing.split(","),
            map(int, args.tokens.split(",")),
        )
    )  # fmt: skip
    if args.sweep:
        for run in runs:
            sweep(*run)
        return 0
    tau, speed = launch_floor(), bandwidth()
    head = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "launch_us": tau * 1e6, "bytes_per_s": speed,
    }  # fmt: skip
    print(_line(head))
    rows = []
    for model, case, routing, t in runs:
        rows.append(measure(model, case, routing, t, tau, speed))
        print(_line(rows[-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps({**head, "rows": rows}, indent=1))
    if args.bars:
        for line in bars(rows):
            print(line)
    return 0


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """The worst of each aim's cases, and whether it is met."""
    lines = []
    for aim in AIMS:
        worst = aim.worst(rows)
        if worst is None:
            lines.append(f"{aim.text}: not measured")
            continue
        word = "met" if worst <= aim.limit else "MISSED"
        lines.append(f"{aim.text}: {worst:.3f}, bar {aim.limit}: {word}")
    return lines


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())


def tiny() -> int:
    """Every case and every routing pattern against the reference."""
    runs = [
        *((case, "uniform") for case in CASES),
        *(("8/2/8", routing) for routing in ROUTING[1:]),
    ]
    for case, routing in runs:
        prepare("tiny", Case.parse(case), routing, 9, copies=1)
    print(f"checked {len(runs)} cases, measured nothing")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
