"""What the engine core knows of one adapter that the workers hold, and of what asks for one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from vllm_lora_ext.errors import AdapterError

MEMORY_IDS = 1 << 30
"""From here to `DERIVED_IDS` the plugin looks for ids of adapters that are handed over as tensors.
vLLM counts from 1; what an adapter is, its path says, since users take ids of any size."""

_MEMORY = "memory:"


def memory_path(name: str) -> str:
    """The path of an adapter that is handed over as tensors."""
    return _MEMORY + name


def from_memory(path: str) -> bool:
    """Whether nobody else has the adapter's tensors."""
    return path.startswith(_MEMORY)


class Adapter(Protocol):
    """What a ledger reads of vLLM's `LoRARequest`."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool


@dataclass
class Held:
    """A version of an adapter that every worker holds.

    Args:
        lora_id: the adapter's; given: nobody else has its tensors, or nobody may have.
        parts: `KeyedPart`, of what stands in a slot; none for a template.
        taken: of one that is not held any more: somebody else took it from the workers.
    """

    lora_id: int
    name: str
    path: str
    given: bool
    version: str
    bytes: int
    system: str
    rank: int
    parts: tuple[Any, ...]
    understands: dict[str, Any]
    taken: bool = False

    @classmethod
    def of(cls, adapter: Adapter | Held, reports: list[Any], given: bool) -> Held:
        """What an adapter's `LoRARequest`, or a version before, and the workers say."""
        one, first = adapter, reports[0]
        named = (
            (one.lora_id, one.name, one.path) if isinstance(one, Held)
            else (one.lora_int_id, one.lora_name, one.lora_path)
        )  # fmt: skip
        return cls(
            *named, given, first.version, max(r.bytes for r in reports), first.system, first.rank,
            first.parts, first.understands,
        )  # fmt: skip

    def without_weights(self, taken: bool) -> Held:
        """What is remembered of it when it leaves."""
        return replace(self, parts=(), understands={}, taken=taken)


def changed(was: Held, seen: str) -> AdapterError:
    """The error for an adapter that was evicted, and whose folder has other content by now."""
    return AdapterError(
        "files_changed", f"adapter {was.name} had left host memory, and its files are another"
        " version by now", seen=seen, limit=was.version,
        fix="load it again with load_inplace to serve what is there now, or put its files back",
    )  # fmt: skip


def incomplete(name: str, understands: dict[str, Any]) -> AdapterError:
    """The error for a template where an adapter must stand."""
    needs = [what for what in ("user", "instruction") if understands.get(what)]
    return AdapterError(
        "missing_setting", f"adapter {name} needs what only a request can say", seen="none",
        limit=f"lora_ext with {' and '.join(needs)}", fix="send it with the request",
    )  # fmt: skip


def id_in_use(adapter: Adapter, held: Held) -> AdapterError:
    """The error for an id that an adapter with another name or path has."""
    return AdapterError(
        "id_in_use", f"lora_int_id {adapter.lora_int_id} already belongs to another adapter",
        seen=f"{adapter.lora_name} at {adapter.lora_path}", limit=f"{held.name} at {held.path}",
        fix="give every adapter its own id, or set load_inplace",
    )  # fmt: skip


def version_conflict(name: str, last: str | None, expected: str) -> AdapterError:
    """The error for an adapter whose version is another than its caller means to change.

    Args:
        last: the version that its requests got last; None or empty: it was never loaded.
    """
    return AdapterError(
        "version_conflict", f"adapter {name} is not at the expected version",
        seen=last or "not loaded", limit=expected, fix="read its version again, and decide anew",
    )  # fmt: skip
