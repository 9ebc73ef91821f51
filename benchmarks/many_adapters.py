"""Throughput and time to the first token with 0 to thousands of adapters, plugin and stock.

    python benchmarks/many_adapters.py [--counts 0,1,10,100,1000] [--slots 8,32] [--engines plugin]
        [--kinds plain,routed] [--shapes power,uniform] [--running 32] [--requests 96]
        [--rounds 5] [--out FILE.json] [--plot]

A `vllm serve` of SmolLM2-135M (CPU, bf16, `--running` requests at a time) for each engine and
number of slots, on loopback, one after the other. Requests of 16 + 16 tokens arrive open-loop
(Poisson, fixed seed), each for an adapter drawn from the first n, uniformly or by a power law
(1/rank); ranks are 4, 8 and 16, on q and v; `routed` are the same with a router over two experts of
half the rank. All adapters are loaded before the clock starts, and a first wave is not timed. Each
count has a wave in every one of `--rounds` rounds, each round in another order, so that no slow
minute of the machine falls on one count. Said are medians, and quantiles of all rounds' times.
Stock, some times slower, has one round.

    saturated   they arrive at 200 a second, far above what the machine does: tokens a second
    half load   they arrive at half of what the first point has done: time to the first token
    loading     as half load, of adapters that are all in slots (half of the slots), in turn without
                and with another client that loads and unloads adapters, one after the other

`swaps` are adapters that went into a slot, `moved` their bytes; the plugin's `/metrics` says both.
Ratios are to n = 1 of the same server. The aim: at most 10 % less at n = 1000 where the slots hold
what a step needs, 25 % where not. A step computes as many adapters as there are slots, so fewer
requests than `--running` share a step where the slots are few: `--running` of the same number with
`--counts 1` says what that alone costs. Servers join those that the file has, in the place of equal
ones; what is compared belongs into one call.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]

PROMPT, ANSWER, RANKS, DISTINCT = 16, 16, (4, 8, 16), 24
SATURATED = 200.0  # requests a second
LOADS_A_SECOND = 2.0


def make_folders(base: str, kind: str, root: Path) -> list[Path]:
    """A few adapters of different ranks, which all names share: each name holds its own copy."""
    from transformers import AutoConfig

    from tests.make_adapters import linear_shapes, normal
    from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
    from vllm_lora_ext.adapters.readers.native import write_native
    from vllm_lora_ext.routing import GateSpec

    rng = np.random.default_rng(0)
    shapes = {
        name: shape for name, shape in linear_shapes(AutoConfig.from_pretrained(base)).items()
        if name.endswith(("q_proj", "v_proj"))
    }  # fmt: skip
    folders = []
    for i in range(DISTINCT):
        rank = RANKS[i % len(RANKS)]
        routed = GateSpec(source="router", blocks=(rank // 2,) * 2, score="softmax", select="all")
        gate = routed if kind == "routed" else GateSpec()
        modules = {
            name: RoutedModule(
                normal(rng, rank, k) / k**0.5, normal(rng, n, rank) * 0.02, gate,
                normal(rng, 2, k) / k**0.5 if kind == "routed" else None,
            )
            for name, (k, n) in shapes.items()
        }  # fmt: skip
        folders.append(write_native(RoutedAdapter(modules, "bench"), root / f"{kind}{i}"))
    return folders


def write_plain(base: str, root: Path) -> list[Path]:
    """The same as PEFT's files, which stock reads too."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from tests.make_adapters import linear_shapes, normal

    rng = np.random.default_rng(0)
    shapes = linear_shapes(AutoConfig.from_pretrained(base))
    folders = []
    for i in range(DISTINCT):
        rank, folder = RANKS[i % len(RANKS)], root / f"plain{i}"
        folder.mkdir(parents=True)
        tensors = {}
        for name, (k, n) in shapes.items():
            if name.endswith(("q_proj", "v_proj")):
                tensors[f"base_model.model.{name}.lora_A.weight"] = normal(rng, rank, k) / k**0.5
                tensors[f"base_model.model.{name}.lora_B.weight"] = normal(rng, n, rank) * 0.02
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
            "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "smollm2",
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


def server_command(base: str, port: int, slots: int, count: int, running: int) -> list[str]:
    settings = {"lora_ext": {"host_cache_mb": 12288}}
    return [
        str(Path(sys.executable).parent / "vllm"), "serve", base, "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "256",
        "--max-num-seqs", str(running), "--enable-lora", "--max-loras", str(slots),
        "--max-lora-rank", "16", "--max-cpu-loras", str(max(count, slots)),
        "--no-enable-prefix-caching", "--seed", "0", "--additional-config", json.dumps(settings),
    ]  # fmt: skip


class Wave:
    """Requests of one run: when each comes, for whom, and what came of it."""

    def __init__(self, count: int, shape: str, requests: int, rate: float, seed: int) -> None:
        rng = np.random.default_rng([seed, count, requests])
        self.at = np.cumsum(rng.exponential(1 / rate, requests))
        weights = 1 / np.arange(1, count + 1) if shape == "power" else np.ones(count)
        drawn = rng.choice(count, requests, p=weights / weights.sum()) if count else None
        self.names = ["base"] * requests if drawn is None else [f"a{i}" for i in drawn]
        self.prompts = rng.integers(1000, 20000, (requests, PROMPT)).tolist()
        self.first: list[float] = []
        self.ends: list[float] = []

    async def run(self, client: httpx.AsyncClient) -> None:
        begin = time.perf_counter()
        jobs = (self._send(client, begin + at, i) for i, at in enumerate(self.at))
        await asyncio.gather(*jobs)

    async def _send(self, client: httpx.AsyncClient, at: float, i: int) -> None:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        sent, first = time.perf_counter(), 0.0
        body = {
            "model": self.names[i], "prompt": self.prompts[i], "max_tokens": ANSWER,
            "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                assert '"error":' not in line, line
                if not first and line.startswith("data: {"):
                    first = time.perf_counter()
        self.first.append(first - sent)
        self.ends.append(time.perf_counter())

    def tokens_per_second(self, begin: float) -> float:
        return len(self.ends) * ANSWER / (max(self.ends) - begin)


class Bench:
    """Runs against one server."""

    def __init__(self, url: str, folders: list[Path], requests: int) -> None:
        self._client = httpx.AsyncClient(
            base_url=url, timeout=600, trust_env=False,
            # The server closes what is idle for 5 s; a request must not meet that.
            limits=httpx.Limits(max_connections=requests + 8, keepalive_expiry=2),
        )  # fmt: skip
        self._folders, self._requests, self._loaded = folders, requests, 0

    async def load(self, count: int) -> float:
        """Loads up to `count` adapters; seconds for each new one."""
        begin, before = time.perf_counter(), self._loaded
        while self._loaded < count:
            folder = self._folders[self._loaded % len(self._folders)]
            await self.post("load", f"a{self._loaded}", str(folder))
            self._loaded += 1
        return (time.perf_counter() - begin) / max(1, count - before)

    async def post(self, what: str, name: str, path: str) -> None:
        body = {"lora_name": name, "lora_path": path}
        answer = await self._client.post(f"/v1/{what}_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text

    async def saturated(self, count: int, shape: str, seed: int) -> dict[str, float]:
        """One wave, which arrives at once: its speed, and what went into slots for it."""
        before = await self.counted()
        wave = Wave(count, shape, self._requests, SATURATED, seed)
        begin = time.perf_counter()
        await wave.run(self._client)
        speed, after = wave.tokens_per_second(begin), await self.counted()
        swaps, moved, waited = (
            after.get(f"activation{what}_total", 0) - before.get(f"activation{what}_total", 0)
            for what in ("s", "_bytes", "_seconds")
        )
        return {"tokens_per_s": speed, "swaps": swaps, "moved_mb": moved / 1e6, "swap_s": waited}

    async def measure(self, points: list[tuple[int, str]], rounds: int) -> list[dict[str, Any]]:
        """A row for each point (count, shape): saturated, and first tokens at half of that."""
        waves: list[list[dict[str, float]]] = [[] for _ in points]
        first: list[list[float]] = [[] for _ in points]
        for count, shape in points:
            await Wave(count, shape, self._requests // 3, SATURATED, 1).run(self._client)
        rate = (await self.saturated(*points[0], 2))["tokens_per_s"] / ANSWER / 2
        for turn in range(rounds):
            for i in np.random.default_rng(turn).permutation(len(points)):
                count, shape = points[i]
                waves[i].append(await self.saturated(count, shape, 100 + turn))
                calm = Wave(count, shape, self._requests, rate, 200 + turn)
                await calm.run(self._client)
                first[i] += calm.first
        return [
            {
                "n": count, "shape": shape, "rate": rate,
                **{key: float(np.median([wave[key] for wave in seen])) for key in seen[0]},
                "tokens_per_s_of": sorted(wave["tokens_per_s"] for wave in seen),
                **_quantiles(times),
            }
            for (count, shape), seen, times in zip(points, waves, first, strict=True)
        ]  # fmt: skip

    async def beside_loads(self, count: int, rate: float, turns: int) -> dict[str, Any]:
        """Time to the first token of adapters in slots, without and with loads of others."""
        await self.load(count)
        await Wave(count, "uniform", 4 * count, rate, 5).run(self._client)
        first: dict[str, list[float]] = {"quiet": [], "loading": []}
        loads = 0
        for turn in range(turns):
            for what, seen in first.items():
                wave = Wave(count, "uniform", self._requests, rate, 10 + turn)
                run = asyncio.create_task(wave.run(self._client))
                while what == "loading" and not run.done():
                    await self.post("load", "other", str(self._folders[loads % DISTINCT]))
                    await self.post("unload", "other", "-")
                    loads += 1
                    await asyncio.wait([run], timeout=1 / LOADS_A_SECOND)
                await run
                seen += wave.first
        said = {what: _quantiles(seen) for what, seen in first.items()}
        return {"n": count, "loads": loads, "rate": rate, **said}

    async def counted(self) -> dict[str, float]:
        text = (await self._client.get("/metrics")).text
        lines = (line.split() for line in text.splitlines() if line.startswith("lora_ext:"))
        return {name.removeprefix("lora_ext:"): float(value) for name, value in lines}

    async def close(self) -> None:
        await self._client.aclose()


async def run_server(
    url: str, folders: list[Path], slots: int, rounds: int, args: Any
) -> dict[str, Any]:
    bench = Bench(url, folders, args.requests)
    points = [(count, shape) for shape in args.shapes for count in args.counts]
    points = [point for point in points if point[0] > 1 or point[1] == args.shapes[0]]
    try:
        load_s = await bench.load(max(args.counts))
        rows = await bench.measure(points, rounds)
        for row in rows:
            print("  " + "  ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)
        beside = await bench.beside_loads(max(slots // 2, 1), rows[0]["rate"], rounds)
        print(f"  load_s {load_s:.4f}  beside loads", beside, flush=True)
    finally:
        await bench.close()
    return {"load_s": load_s, "rows": rows, "beside_loads": beside}


def _quantiles(first: list[float]) -> dict[str, float]:
    """Of times to the first token."""
    found = 1e3 * np.quantile(first, (0.5, 0.99))
    return {"ttft_p50_ms": float(found[0]), "ttft_p99_ms": float(found[1])}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(servers: list[dict[str, Any]], out: Path) -> None:
    """Tokens a second over the number of adapters, a line for each server and distribution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for shape, axes in zip(("power", "uniform"), panels, strict=True):
        for server in servers:
            rows = [row for row in server["rows"] if row["shape"] == shape and row["n"]]
            if len(rows) > 1:
                label = f"{server['engine']}, {server['kind']}, {server['slots']} slots"
                style = "o-" if server["engine"] == "plugin" else "s--"
                axes.plot([row["n"] for row in rows], [row["tokens_per_s"] for row in rows], style,
                          label=label)  # fmt: skip
        axes.set(xscale="log", ylim=(0, None), xlabel="adapters", title=shape)
    panels[0].set(ylabel="tokens a second")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--counts", default="0,1,10,100,1000")
    parser.add_argument("--slots", default="8,32")
    parser.add_argument("--engines", default="plugin,stock")
    parser.add_argument("--kinds", default="plain,routed")
    parser.add_argument("--shapes", default="power,uniform")
    parser.add_argument("--running", default="32")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/results/many_adapters.json")
    args = parser.parse_args()
    args.counts = [int(n) for n in args.counts.split(",")]
    args.shapes = args.shapes.split(",")
    from base_model import ensure_base

    from integration_tests.server import free_port, serving

    base = str(ensure_base())
    environ = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}",  # type: ignore[operator]
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        made = {
            "plain": write_plain(base, root / "peft"),
            "routed": make_folders(base, "routed", root / "native"),
        }  # fmt: skip
        for slots, running, kind, engine in itertools.product(
            map(int, args.slots.split(",")), map(int, args.running.split(",")),
            args.kinds.split(","), args.engines.split(","),
        ):  # fmt: skip
            if engine == "stock" and kind == "routed":
                continue  # it has none
            name = {"engine": engine, "kind": kind, "slots": slots, "running": running}
            rounds = args.rounds if engine == "plugin" else 1
            off = {"VLLM_LORA_EXT_DISABLE": "0" if engine == "plugin" else "1"}
            argv = server_command(base, free_port(), slots, max(args.counts), running)
            print(name, flush=True)
            with serving(argv, root / "log", **environ, **off) as server:
                found = asyncio.run(run_server(server.url, made[kind], slots, rounds, args))
            save(args.out, name, {"requests": args.requests, "rounds": rounds, **found})
    if args.plot:
        plot(json.loads(args.out.read_text())["servers"], args.out.with_suffix(".png"))


def save(out: Path, name: dict[str, Any], found: dict[str, Any]) -> None:
    """Puts one server's numbers into the file, in the place of an equal one's."""
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text())["servers"] if out.exists() else []
    others = [server for server in before if not name.items() <= server.items()]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "tokens": [PROMPT, ANSWER],
        "ranks": RANKS, "servers": [*others, {**name, **found}],
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
