"""A soak from its beginning to its verdict, against a server that runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from integration_tests.server import Server
from integration_tests.soak import world
from integration_tests.soak.acts import Client, Tally
from integration_tests.soak.api import Api
from integration_tests.soak.measure import Kept, Memory, kept, usable_slots

GROWTH_MIB = 32
"""Bound of what a server's processes may grow by after the warm-up (`measure.Memory`)."""

_COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "adapters into slots": "lora_ext:activations_total",
    "loads": "lora_ext:load_seconds_count",
    "adapters evicted": "lora_ext:adapters_evicted_total",
    "derived adapters made": "lora_ext:derived_adapters_made_total",
}


@dataclass(frozen=True)
class Report:
    """What a soak has seen."""

    seconds: float
    tally: Tally
    before: Kept
    after: Kept
    unusable: int
    memory: Memory
    counted: dict[str, int]

    def leaks(self) -> dict[str, int]:
        """What the server kept beyond what it had before the traffic; all 0 where it is well."""
        before, after = self.before, self.after
        return {
            "leaked adapters": len(after.adapters - before.adapters) + after.older,
            "leaked requests": after.requests,
            "leaked slots": self.unusable,
            "leaked bytes of adapters": max(after.bytes - before.bytes, 0),
            "leaked KV blocks": int(after.kv > before.kv),
            "leaked open files": (after.files - before.files).total(),
            "half-made folders": after.parts,
        }

    def faults(self) -> dict[str, int]:
        """What should be 0 and is not."""
        growth = self.memory.growth >> 20
        found = {**self.tally.faults, **self.leaks()}
        found[f"MiB of growth over {GROWTH_MIB}"] = max(growth - GROWTH_MIB, 0)
        return {what: count for what, count in found.items() if count}

    def table(self) -> str:
        """For people."""
        requests = self.tally.requests
        rows = [("seconds of traffic", f"{self.seconds:.0f}"), ("requests", requests.total())]
        rows += [(f"  {status}", count) for status, count in sorted(requests.items())]
        rows += [(f"act: {act}", count) for act, count in sorted(self.tally.acts.items())]
        rows += [(f"refused: {code}", n) for code, n in sorted(self.tally.refusals.items())]
        rows += list(self.counted.items())
        usual = ("wrong answers", "5xx answers", "refused without a reason", "wrong refusals",
                 "broken answers")  # fmt: skip
        rows += [(what, self.tally.faults[what]) for what in usual]
        rows += list(self.leaks().items())
        rows += [("MiB of memory, most", self.memory.peak >> 20),
                 (f"MiB of growth, at most {GROWTH_MIB}", self.memory.growth >> 20)]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {value:>8}" for name, value in rows]
        more = self.after.files - self.before.files
        lines += [f"left open: {count} of {what}" for what, count in more.items()]
        return "\n".join([*lines, *self.tally.details])


def soak(
    server: Server, root: Path, seconds: float, clients: int, say: Callable[[str], None] = print
) -> Report:
    """Traffic of many clients on a server that merges by name and lets everyone load.

    Args:
        root: a folder of its own for adapters, which the server may read.
    """
    begin, told = time.monotonic(), world.make(root)
    with closing(Api(server.url)) as api:
        world.learn(told, api)
        before = kept(api, server.process.pid, root.parent)
        world.hold(told, api, world.LIVE)
        say(f"answers known after {time.monotonic() - begin:.0f} s, {before.bytes >> 10} KiB held")
        counted, memory, tally = api.metrics(), Memory(server.process.pid), Tally()
        took = _traffic(server.url, told, tally, seconds, clients)
        memory.stop()
        usable, metrics = usable_slots(api), api.metrics()
        world.forget(api, but=world.STATIC)
        after = kept(api, server.process.pid, root.parent)
        world.forget(api)
    slots = int(metrics["lora_ext:slots"])
    return Report(
        took, tally, before, after, min(slots, len(world.STATIC + world.LIVE)) - usable, memory,
        {what: int(metrics[name] - counted.get(name, 0)) for what, name in _COUNTED.items()},
    )  # fmt: skip


def _traffic(url: str, told: world.World, tally: Tally, seconds: float, clients: int) -> float:
    stop = threading.Event()
    crowd = [
        threading.Thread(target=Client(i, url, told, tally).run, args=(stop,), daemon=True)
        for i in range(clients)
    ]
    begin = time.monotonic()
    for thread in crowd:
        thread.start()
    while time.monotonic() - begin < seconds and any(t.is_alive() for t in crowd):
        time.sleep(0.2)
    took = time.monotonic() - begin
    stop.set()
    for thread in crowd:
        thread.join(180)
        if thread.is_alive():
            tally.fault("requests without an answer", thread.name)
    return took
