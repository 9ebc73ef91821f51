"""What front ends count, on vLLM's `/metrics`.

Not named like vLLM's own: those are dropped where its statistics begin. What the engine core and
its workers count, they are asked for when somebody reads (`engine_metrics`).
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Histogram

from vllm_lora_ext.conditions.recipe import DERIVED_IDS

_MEANINGS = {
    "derived_adapters_made": "Adapters that were made for a request: composed, scaled, of a user"
    " or of an instruction.",
    "derived_adapters_hit": "Requests whose derived adapter was there already.",
    "gate_passes": "Gates that the base model computed for an instruction.",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@cache
def _counter(name: str) -> Counter:
    """Made when first counted: processes that serve no requests have none."""
    return Counter(f"lora_ext:{name}", _MEANINGS[name])


@cache
def _refusals() -> Counter:
    return Counter("lora_ext:refusals", "What clients were refused, by code.", ["code"])


@cache
def _load_seconds() -> Histogram:
    return Histogram(
        "lora_ext:load_seconds", "Loads of adapters that succeeded: reading, checking and waiting"
        " for a step to end; not of what was there already.", buckets=_SECONDS,
    )  # fmt: skip


def show() -> None:
    """Has all of them stand on `/metrics`, from 0."""
    for name in _MEANINGS:
        _counter(name)
    _refusals()
    _load_seconds()


def made(lora_id: int, seconds: float) -> None:
    """Of an adapter that the core was asked for."""
    if lora_id >= DERIVED_IDS:
        _counter("derived_adapters_made").inc()
    else:
        _load_seconds().observe(seconds)


def hit() -> None:
    """Of a request whose derived adapter was there."""
    _counter("derived_adapters_hit").inc()


def gate_passed() -> None:
    """Of an instruction whose gate was not known."""
    _counter("gate_passes").inc()


def refused(code: str) -> None:
    """Of an answer that is an error."""
    _refusals().labels(code).inc()
