"""What a server keeps: memory, files, slots, KV blocks, adapters. Read from outside."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from integration_tests.soak.api import Api, Question
from integration_tests.soak.world import LIVE, PROMPTS, STATIC

_QUIET_S = 30
_SLOTS_NEEDED = (*STATIC, *LIVE)


@dataclass(frozen=True)
class Kept:
    """Of an idle server.

    Args:
        adapters: names that answer; older: versions behind them that no new request gets.
        requests: running, waiting, or counted as an adapter's.
        bytes: host memory of adapters; kv: share of the KV cache that is taken.
        slots: those that hold an adapter after as many were asked for.
        files: kinds of open ones, of all its processes; parts: half-made folders on its disk.
    """

    adapters: frozenset[str]
    older: int
    requests: int
    bytes: int
    kv: float
    slots: int
    files: Counter[str]
    parts: int


def kept(api: Api, server: int, disk: Path) -> Kept:
    """Waits until the server is idle, and a moment for what it cleans up afterwards.

    Args:
        server: its process; disk: below it lies all that it writes.
    """
    deadline = time.monotonic() + _QUIET_S
    before, now = None, _look(api, server, disk)
    while (now != before or now.requests or now.parts) and time.monotonic() < deadline:
        time.sleep(1)
        before, now = now, _look(api, server, disk)
    return now


def _look(api: Api, server: int, disk: Path) -> Kept:
    rows, metrics = api.adapters(), api.metrics()
    in_flight = sum(r["in_flight"] + sum(o["in_flight"] for o in r["older"]) for r in rows.values())
    waiting = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
    return Kept(
        adapters=frozenset(rows),
        older=sum(len(row["older"]) for row in rows.values()),
        requests=int(in_flight + waiting),
        bytes=int(metrics["lora_ext:resident_bytes"]),
        kv=metrics["vllm:kv_cache_usage_perc"],
        slots=int(metrics["lora_ext:slots_used"]),
        files=sum(map(_open_files, _tree(server)), Counter()),
        parts=sum(1 for path in disk.rglob(".*") if path.is_dir() and path.name != ".locks"),
    )


def usable_slots(api: Api) -> int:
    """Slots that take an adapter: as many are asked for, one after the other."""
    for name in _SLOTS_NEEDED:
        answer = api.ask(Question(name, PROMPTS[0]), 1)
        assert answer is not None and answer.ok, answer
    rows = api.adapters()
    return sum(rows[name]["residency"] == "slot" for name in _SLOTS_NEEDED)


class Memory:
    """Resident memory of a server's processes, looked at every second.

    Growth is the median of the last tenth of the time less that of the tenth after the warm-up, a
    quarter of the time: until then pools, caches and the allocator's arenas grow to what they need.
    """

    def __init__(self, server: int) -> None:
        self._server, self._seen = server, [_resident(server)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._seen.append(_resident(self._server))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return max(self._seen)

    @property
    def growth(self) -> int:
        """Bytes, from the end of the warm-up to the end."""
        warm, tenth = len(self._seen) // 4, max(len(self._seen) // 10, 1)
        first, last = self._seen[warm : warm + tenth], self._seen[-tenth:]
        return int(statistics.median(last) - statistics.median(first))


def _tree(server: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(server)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _open_files(process: psutil.Process) -> Counter[str]:
    """Sockets and pipes without their numbers; files by their paths."""
    found: Counter[str] = Counter()
    with suppress(OSError, psutil.Error):
        for one in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):
                found[f"{process.name()}: {os.readlink(one).split(':[')[0]}"] += 1
    return found


def _resident(server: int) -> int:
    total = 0
    for process in _tree(server):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total
