"""What goes into slots, counted: by each worker, and taken by whoever reads the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

STATS = "lora_ext_stats"
"""Method of the worker (`worker_rpc`): a `Stats` as a dict."""


@dataclass
class Traffic:
    """Since the engine's start.

    Args:
        steps: with an adapter in them.
        activations: adapters that went into a slot for a step or a load; bytes: of them.
        seconds: that took, of the thread that runs the steps.
    """

    steps: int = 0
    activations: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Stats:
    """What a worker says of its adapters.

    Args:
        active: ids that are in slots; slots: how many there are.
        resident_bytes, limit_bytes: of host memory for adapters.
        experts: of traced requests (`ExpertLoad.sums`); the same on every worker.
    """

    active: tuple[int, ...]
    slots: int
    resident_bytes: int
    limit_bytes: int
    traffic: Traffic
    experts: Mapping[str, list[float]]


def total(ranks: Iterable[Mapping[str, float]]) -> Traffic:
    """Of all workers: each moves its part, all of them in the same steps."""
    counts = list(ranks)
    return Traffic(
        int(max(c["steps"] for c in counts)), int(max(c["activations"] for c in counts)),
        int(sum(c["bytes"] for c in counts)), max(c["seconds"] for c in counts),
    )  # fmt: skip
