"""Plans a fleet from what one server does: which placement of 100 000 adapters on N servers.

    python benchmarks/fleet_sim.py [--servers 4,8,16,32] [--adapters 100000] [--load 0.6]
        [--held 2000] [--slots 32] [--alpha 1.0] [--requests 40000] [--out FILE.json]

A simulation, and no more than that: requests of 16 + 16 tokens arrive (Poisson) for adapters drawn
by a power law (1/rank^alpha), a gateway places each by a policy, and each server does what a server
of this package was measured to do: `serving_overhead.json` says how long a step takes with 1, 8 and
32 requests and what a prompt's token costs, `fleet_worker.json` how long loading an adapter takes,
its bytes, and what putting it into a slot costs. Loads run beside the steps, one at a time; each
server holds `--held` adapters and forgets the one that was not used for the longest time; a step
has adapters for `--slots` slots, requests for others wait.

    hash            the adapter's hash modulo the number of servers
    ring            consistent hashing with bounded loads: the next server when one is full
    ring, 2 copies  the less busy of the two servers that follow on the ring
    least loaded    the server with the fewest requests, whatever it holds
    affine          the least loaded of those that hold the adapter, unless it has `SLACK` times the
                    mean's requests; else the least loaded of all (Ray Serve's multiplexing, llm-d's
                    and KServe's LoRA affinity are of this kind)

`moved when one leaves` is the share of requests whose home changes when a server is taken away.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import json
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks/results"
PROMPT, ANSWER = 16, 16
RUNNING = 32  # requests that a server computes at a time
POINTS = 64  # of each server on the ring
SLACK = 1.25


@dataclass(frozen=True)
class Measured:
    """What one server was measured to do.

    Args:
        steps: seconds of a step by the number of requests in it, ascending.
        prefill_s: a prompt's token; load_s: an adapter, from its files until it may be used.
        adapter_mb: an adapter; swap_s: into a slot.
    """

    steps: tuple[tuple[int, float], ...]
    prefill_s: float
    load_s: float
    adapter_mb: float
    swap_s: float

    def step_s(self, running: int) -> float:
        """A step of so many requests, between the measured ones on a straight line."""
        points = [(0, self.steps[0][1]), *self.steps]
        for (low, a), (high, b) in pairwise(points):
            if running <= high:
                return a + (b - a) * (running - low) / (high - low)
        return points[-1][1] * running / points[-1][0]

    @property
    def capacity(self) -> float:
        """Requests a second of a server that never waits for an adapter."""
        return RUNNING / (ANSWER * self.step_s(RUNNING) + RUNNING * PROMPT * self.prefill_s)


def measured(overhead: Path, worker: Path) -> Measured:
    """Out of the two files; medians."""
    seconds = json.loads(overhead.read_text())
    tokens, prompt = seconds["decode_tokens"], seconds["prefill_tokens"]
    seconds = {k: statistics.median(v) for k, v in seconds["seconds"].items()}
    sizes = sorted(int(k.rpartition("/")[2]) for k in seconds if k.startswith("plugin/plain8/dec"))
    steps = tuple((b, seconds[f"plugin/plain8/decode/{b}"] / tokens) for b in sizes)
    most = sizes[-1]
    prefill_s = seconds[f"plugin/plain8/prefill/{most}"] / most / prompt
    own = json.loads(worker.read_text())
    return Measured(steps, prefill_s, own["load_s"], own["adapter_mb"], own["swap_s"])


@dataclass(eq=False)
class Server:
    """One server: requests share its steps, so all of them advance alike.

    `clock` counts the steps that each running request has seen; a request is done when it reaches
    its own mark.

    Args:
        limit: adapters in its memory; room: slots, the adapters of one step.
    """

    name: int
    does: Measured
    limit: int
    room: int = RUNNING
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    running: list[tuple[float, int]] = field(default_factory=list)
    active: dict[int, int] = field(default_factory=dict)
    slots: OrderedDict[int, None] = field(default_factory=OrderedDict)
    loads: dict[int, float] = field(default_factory=dict)  # adapter → when it is there
    now: float = 0.0
    clock: float = 0.0
    paused: float = 0.0  # seconds of prefill and swaps that its steps still wait for
    moved: int = 0
    first: list[float] = field(default_factory=list)

    @property
    def busy(self) -> int:
        return len(self.running) + len(self.waiting)

    def advance(self, to: float) -> None:
        """Lets its requests run until then."""
        while self.now < to:
            due = min((at for at in self.loads.values() if at > self.now), default=to)
            until = min(due, to)
            if not self.running:
                self.now = until
            else:
                step_s = self.does.step_s(len(self.running))
                ends = self.now + self.paused + (self.running[0][0] - self.clock) * step_s
                stop = min(ends, until)
                spent = stop - self.now
                rest = max(0.0, spent - self.paused)
                self.paused = max(0.0, self.paused - spent)
                self.clock += rest / step_s
                self.now = stop
                self._finish()
            self._begin()

    def _finish(self) -> None:
        while self.running and self.running[0][0] <= self.clock + 1e-9:
            _, adapter = heapq.heappop(self.running)
            self.active[adapter] -= 1
            if not self.active[adapter]:
                del self.active[adapter]

    def _begin(self) -> None:
        """Takes waiting requests in whose adapter is there and has, or gets, a slot."""
        still: deque[tuple[int, float]] = deque()
        while self.waiting:
            adapter, came = self.waiting.popleft()
            there = self.loads.get(adapter, 0.0) <= self.now
            free = len(self.running) < RUNNING
            if there and free and (adapter in self.active or len(self.active) < self.room):
                self._take(adapter, came)
            else:
                still.append((adapter, came))
            if not free:
                break
        self.waiting.extendleft(reversed(still))

    def _take(self, adapter: int, came: float) -> None:
        self.loads.pop(adapter, None)
        self.active[adapter] = self.active.get(adapter, 0) + 1
        if adapter in self.slots:
            self.slots.move_to_end(adapter)
        else:
            idle = [a for a in self.slots if a not in self.active]
            if len(self.slots) >= self.room and idle:
                del self.slots[idle[0]]
            self.slots[adapter] = None
            self.paused += self.does.swap_s
        prefill = PROMPT * self.does.prefill_s
        self.paused += prefill
        heapq.heappush(self.running, (self.clock + ANSWER, adapter))
        self.first.append(self.now - came + prefill + self.does.step_s(len(self.running)))

    def accept(self, adapter: int, at: float) -> bool:
        """A request; whether its adapter was there."""
        hit = adapter in self.held
        if hit:
            self.held.move_to_end(adapter)
        else:
            begun = max([at, *self.loads.values()])  # one after the other
            self.loads[adapter] = begun + self.does.load_s
            self.moved += 1
            self.held[adapter] = None
            if len(self.held) > self.limit:
                self.held.popitem(last=False)
        self.waiting.append((adapter, at))
        self._begin()
        return hit


class Ring:
    """Consistent hashing."""

    def __init__(self, names: Sequence[int]) -> None:
        points = sorted((_hash(f"{name}/{i}"), name) for name in names for i in range(POINTS))
        self._places, self._names = [p for p, _ in points], [n for _, n in points]
        self._count = len(names)

    def following(self, adapter: int, count: int) -> list[int]:
        """The first servers at or after the adapter's place, each once."""
        at, found = bisect.bisect(self._places, _hash(str(adapter))), []
        while len(found) < min(count, self._count):
            name = self._names[at % len(self._names)]
            if name not in found:
                found.append(name)
            at += 1
        return found


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


Policy = Callable[[int, Sequence[Server]], Server]


def least(servers: Sequence[Server]) -> Server:
    return min(servers, key=lambda s: s.busy)


def by_hash(names: Sequence[int]) -> Policy:
    return lambda adapter, servers: servers[_hash(str(adapter)) % len(servers)]


def by_ring(names: Sequence[int], copies: int = 0) -> Policy:
    """Without copies: the first that is not over `SLACK` times the mean."""
    ring, place = Ring(names), {name: i for i, name in enumerate(names)}

    def choose(adapter: int, servers: Sequence[Server]) -> Server:
        if copies:
            return least([servers[place[n]] for n in ring.following(adapter, copies)])
        most = SLACK * (sum(s.busy for s in servers) + 1) / len(servers) + 1
        order = ring.following(adapter, len(servers))
        return next((servers[place[n]] for n in order if servers[place[n]].busy < most),
                    least(servers))  # fmt: skip

    return choose


def by_load(names: Sequence[int]) -> Policy:
    return lambda adapter, servers: least(servers)


def by_affinity(names: Sequence[int]) -> Policy:
    def choose(adapter: int, servers: Sequence[Server]) -> Server:
        holders = [s for s in servers if adapter in s.held]
        if holders:
            best = least(holders)
            mean = sum(s.busy for s in servers) / len(servers)
            if best.busy <= SLACK * mean + RUNNING / 4:
                return best
        return least(servers)

    return choose


POLICIES: dict[str, Callable[[Sequence[int]], Policy]] = {
    "hash": by_hash, "ring": by_ring, "ring, 2 copies": lambda names: by_ring(names, 2),
    "least loaded": by_load, "affine": by_affinity,
}  # fmt: skip


def simulate(
    does: Measured,
    policy: str,
    count: int,
    adapters: np.ndarray,
    times: np.ndarray,
    held: int,
    slots: int = RUNNING,
) -> dict[str, Any]:
    """One run; the first third only fills the servers.

    Args:
        adapters: whom each request is for; times: when it comes.
    """
    servers = [Server(i, does, held, slots) for i in range(count)]
    choose = POLICIES[policy](range(count))
    warm, hits = len(adapters) // 3, 0
    for i, (adapter, at) in enumerate(zip(adapters.tolist(), times.tolist(), strict=True)):
        for server in servers:
            server.advance(at)
        if i == warm:
            for server in servers:
                server.first.clear()
                server.moved = 0
        hit = choose(adapter, servers).accept(adapter, at)
        hits += hit and i >= warm
    for server in servers:
        server.advance(times[-1] + 600)
    first = np.concatenate([np.array(server.first) for server in servers])
    served = [len(server.first) for server in servers]
    span = float(times[-1] - times[warm])
    return {
        "policy": policy, "servers": count, "hit_rate": hits / (len(adapters) - warm),
        "ttft_p50_ms": 1e3 * float(np.quantile(first, 0.5)),
        "ttft_p99_ms": 1e3 * float(np.quantile(first, 0.99)),
        "moved_mb_per_s": sum(server.moved for server in servers) * does.adapter_mb / span,
        "busiest_by_mean": max(served) / statistics.mean(served),
        "moved_when_one_leaves": moved_when_one_leaves(policy, count, adapters[warm:]),
    }  # fmt: skip


def moved_when_one_leaves(policy: str, count: int, adapters: np.ndarray) -> float | None:
    """Share of requests whose home changes; None where there is no home."""
    if policy in ("least loaded", "affine") or count < 2:
        return None
    sample = adapters[:4000].tolist()
    names = list(range(count))
    if policy == "hash":
        homes = [[_hash(str(a)) % n for a in sample] for n in (count, count - 1)]
    else:
        rings = [Ring(names[:n]) for n in (count, count - 1)]
        homes = [[ring.following(a, 1)[0] for a in sample] for ring in rings]
    return sum(a != b for a, b in zip(*homes, strict=True)) / len(sample)


def draw_requests(
    adapters: int, alpha: float, requests: int, rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, adapters + 1) ** alpha
    names = rng.permutation(adapters)[rng.choice(adapters, requests, p=weights / weights.sum())]
    return names, np.cumsum(rng.exponential(1 / rate, requests))


def plot(rows: list[dict[str, Any]], title: str, out: Path) -> None:
    """Hit rate, 99th percentile and bytes over the number of servers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "hit_rate": "requests whose adapter was there", "ttft_p99_ms": "first token, p99, ms",
        "moved_mb_per_s": "loaded, MB/s, all servers",
    }  # fmt: skip
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4))
    for panel, (key, name) in zip(axes, panels.items(), strict=True):
        for policy in POLICIES:
            own = [row for row in rows if row["policy"] == policy]
            panel.plot([r["servers"] for r in own], [r[key] for r in own], "o-", ms=4, label=policy)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("servers")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[1].set_yscale("log")
    axes[2].set_ylim(0, None)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", default="4,8,16,32")
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--load", type=float, default=0.6, help="share of all servers' capacity")
    parser.add_argument("--held", type=int, default=2000, help="adapters in a server's memory")
    parser.add_argument("--slots", type=int, default=RUNNING, help="adapters in a server's step")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the power law")
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--overhead", type=Path, default=RESULTS / "serving_overhead.json")
    parser.add_argument("--worker", type=Path, default=RESULTS / "fleet_worker.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "fleet_sim.json")
    args = parser.parse_args()
    does, rows = measured(args.overhead, args.worker), []
    print(f"one server: {does.capacity:.1f} requests/s; {does}")
    for count in map(int, args.servers.split(",")):
        rate = args.load * does.capacity * count
        names, times = draw_requests(args.adapters, args.alpha, args.requests, rate, count)
        for policy in POLICIES:
            row = simulate(does, policy, count, names, times, args.held, args.slots)
            rows.append(row | {"requests_per_s": rate})
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}"
                            for k, v in row.items()), flush=True)  # fmt: skip
    report = {
        "adapters": args.adapters, "alpha": args.alpha, "held": args.held, "load": args.load,
        "requests": args.requests, "slots": args.slots, "running": RUNNING,
        "one_server": {**vars(does), "requests_per_s": does.capacity}, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = (f"{args.adapters} adapters, 1/rank^{args.alpha:g}, {args.held} held by each server, "
             f"{args.load:.0%} of capacity")  # fmt: skip
    plot(rows, title, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
