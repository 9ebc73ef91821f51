"""What the engine core and its workers count, on the server's `/metrics`."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge

_GAUGES = {
    "slots": "Adapter slots of all engines (--max-loras each).",
    "slots_used": "Slots that hold an adapter.",
    "resident_bytes": "Host memory that holds adapters, of all workers.",
    "limit_bytes": "Host memory that adapters may take (host_cache_mb), of all workers.",
}
_COUNTERS = {
    "steps": ("adapter_steps", "Steps of the engine with an adapter in them."),
    "activations": ("activations", "Adapters that went from host memory into a slot."),
    "bytes": ("activation_bytes", "Bytes of them, of all workers."),
    "seconds": ("activation_seconds", "Seconds that steps waited for that."),
    "adapters_evicted": (
        "adapters_evicted",
        "Loaded adapters that made way for others; they are read again when asked for.",
    ),
    "derived_adapters_evicted": (
        "derived_adapters_evicted",
        "Derived adapters that made way for others.",
    ),
}


@cache
def _gauge(name: str) -> Gauge:
    # Several servers of one engine say the same, each as it was when that one was asked last.
    return Gauge(f"lora_ext:{name}", _GAUGES[name], multiprocess_mode="mostrecent")


@cache
def _counter(name: str) -> Counter:
    return Counter(f"lora_ext:{_COUNTERS[name][0]}", _COUNTERS[name][1])


@cache
def _resident() -> Gauge:
    return Gauge(
        "lora_ext:adapters", "Adapters that are held, by where and by system.",
        ["residency", "system"], multiprocess_mode="mostrecent",
    )  # fmt: skip


@cache
def _experts() -> Gauge:
    return Gauge(
        "lora_ext:traced_expert_weight", "Sum of |weight| that each expert of an adapter was given,"
        " over the tokens of traced requests and all routed layers.",
        ["adapter", "expert"], multiprocess_mode="mostrecent",
    )  # fmt: skip


def show(state: Mapping[str, Any]) -> None:
    """Has `/metrics` say what a core says of itself (`CoreAdapters.state`), with its counts."""
    for name in _GAUGES:
        _gauge(name).set(state[name])
    for name in _COUNTERS:
        _counter(name).inc(state["counts"][name])
    _resident().clear()
    held = Tally((row["residency"], row["system"]) for row in state["adapters"])
    for labels, count in held.items():
        _resident().labels(*labels).set(count)
    _experts().clear()
    for adapter, sums in state["experts"].items():
        for expert, weight in enumerate(sums):
            _experts().labels(adapter, str(expert)).set(weight)
