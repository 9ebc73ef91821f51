"""Counters on vLLM's `/metrics`, of what front ends see of derived adapters.

Not named like vLLM's own: those are dropped where its statistics begin.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from prometheus_client import Counter

from vllm_lora_ext.conditions.recipe import DERIVED_IDS

_MEANINGS = {
    "derived_adapters_made": "Adapters that were made for a request: composed, scaled, of a user"
    " or of an instruction.",
    "derived_adapters_hit": "Requests whose derived adapter was there already.",
    "derived_adapters_evicted": "Derived adapters that made way for others.",
    "gate_passes": "Gates that the base model computed for an instruction.",
}


@cache
def _counter(name: str) -> Counter:
    """Made when first counted: processes that serve no requests have none."""
    return Counter(f"lora_ext:{name}", _MEANINGS[name])


def show() -> None:
    """Has all of them stand on `/metrics`, from 0."""
    for name in _MEANINGS:
        _counter(name)


def made(lora_id: int) -> None:
    """Of an adapter that the core was asked for."""
    if lora_id >= DERIVED_IDS:
        _counter("derived_adapters_made").inc()


def hit() -> None:
    """Of a request whose derived adapter was there."""
    _counter("derived_adapters_hit").inc()


def evicted(lora_ids: Iterable[int]) -> None:
    """Of adapters that the core dropped."""
    count = sum(lora_id >= DERIVED_IDS for lora_id in lora_ids)
    if count:
        _counter("derived_adapters_evicted").inc(count)


def gate_passed() -> None:
    """Of an instruction whose gate was not known."""
    _counter("gate_passes").inc()
