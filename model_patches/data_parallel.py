"""One answer of the engine cores that a front end has, which under data parallelism are several.

Stock sends a call to all of them and hears the first core's answer only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.core_calls import TAKE_BACK

_NEARNESS = ("none", "host", "slot")
_SUMS = ("slots", "slots_used", "resident_bytes", "limit_bytes")


async def ask(client: Any, method: str, *args: Any) -> list[Any]:
    """Calls a method of every core.

    Args:
        client: an `AsyncMPClient`.
    """
    calls = (client._call_utility_async(method, *args, engine=core) for core in client.core_engines)
    return await asyncio.gather(*calls)


async def first(client: Any, method: str, *args: Any) -> Any:
    """As `ask`, for a call that is answered by all alike: they step together, so all are asked."""
    return (await ask(client, method, *args))[0]


async def change(client: Any, method: str, lora: LoRARequest, *args: Any) -> dict[str, Any]:
    """What `CoreAdapters.add` and `roll_back` answer, done by all cores or by none: where one
    refuses, or has read other files, the others' requests get again what they got before."""
    replies = await ask(client, method, lora, *args)
    errors = [reply for reply in replies if "error" in reply]
    if not errors and len({reply["version"] for reply in replies}) == 1:
        evicted = set().union(*(reply["evicted"] for reply in replies))
        read = any(reply["read"] for reply in replies)
        return {**replies[0], "evicted": sorted(evicted), "read": read}
    await asyncio.gather(*(
        client._call_utility_async(
            TAKE_BACK, lora, reply["version"], reply["before"], engine=core
        )
        for core, reply in zip(client.core_engines, replies, strict=True) if "error" not in reply
    ))  # fmt: skip
    return errors[0] if errors else {"error": str(AdapterError(
        "files_changed", "the engines read different files under the adapter's path",
        seen=lora.lora_path, fix="load it again once they are complete, the same on every machine",
    ))}  # fmt: skip


def whole(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all cores hold (`CoreAdapters.state`), as if they were one."""
    if len(states) == 1:
        return states[0]
    found: dict[str, Any] = {name: sum(state[name] for state in states) for name in _SUMS}
    found["adapters"] = _rows([row for state in states for row in state["adapters"]])
    if "counts" in states[0]:
        found["counts"] = {
            name: sum(state["counts"][name] for state in states) for name in states[0]["counts"]
        }
        found["experts"] = _experts(state["experts"] for state in states)
    return found


def _rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each adapter."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        one = found.setdefault(row["id"], row)
        if one is row:
            continue
        found[row["id"]] = one | {
            "pinned": one["pinned"] and row["pinned"],
            "residency": max(one["residency"], row["residency"], key=_NEARNESS.index),
            "in_flight": one["in_flight"] + row["in_flight"],
            "older": _older([*one["older"], *row["older"]]),
        }
    return [found[lora_id] for lora_id in sorted(found)]


def _older(versions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    in_flight: Counter[str] = Counter()
    for one in versions:
        in_flight[one["version"]] += one["in_flight"]
    return [{"version": version, "in_flight": count} for version, count in in_flight.items()]


def _experts(of_cores: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in of_cores:
        for adapter, sums in one.items():
            # A core knows the experts of what it has traced, which may be of another version.
            pairs = zip_longest(found.get(adapter, []), sums, fillvalue=0.0)
            found[adapter] = [a + b for a, b in pairs]
    return found
