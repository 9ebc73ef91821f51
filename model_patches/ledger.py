"""Which adapters the workers of one engine hold: the engine core's own book of them.

The core alone knows both sides: what the workers hold (they report it with every load) and which
adapters unfinished requests name. So it is the core that says what may be evicted, that has an
adapter loaded before a request for it is scheduled, and that knows an adapter's version, which is
its identity in the prefix cache. One thread uses a ledger; `version` may be read from others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.errors import AdapterError

LOAD, VERSIONS = "lora_ext_load", "lora_ext_versions"
"""Methods of the worker (`worker_rpc`)."""

MEMORY_IDS = 1 << 30
"""Ids from here to `DERIVED_IDS` belong to adapters that were handed over as tensors; vLLM counts
from 1."""


def from_memory(lora_id: int) -> bool:
    """Whether nobody else has the adapter's tensors."""
    return MEMORY_IDS <= lora_id < DERIVED_IDS


class Adapter(Protocol):
    """What a ledger reads of vLLM's `LoRARequest`."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool


@dataclass
class Held:
    """An adapter that every worker holds."""

    name: str
    path: str
    version: str
    bytes: int
    parts: tuple[Any, ...]  # `SlotPart`: of what stands in a slot; none for a template
    understands: dict[str, Any]
    pinned: bool = False


class Ledger:
    """Adapters by id.

    Args:
        rpc: calls a method of every worker with these arguments and returns all answers.
        slots: adapters that one step can use.
        named: ids that unfinished requests name.
        running: those of them whose requests are being computed.
        replaced: called with an id when other content stands under it than before.
        lost: called with an id and the reason when nothing stands under it any more although
            unfinished requests name it.
    """

    def __init__(
        self,
        rpc: Callable[..., list[Any]],
        slots: int,
        named: Callable[[], set[int]],
        running: Callable[[], set[int]],
        replaced: Callable[[int], None],
        lost: Callable[[int, AdapterError], None],
    ) -> None:
        self._rpc, self._slots = rpc, slots
        self._named, self._running = named, running
        self._replaced, self._lost = replaced, lost
        self._held: dict[int, Held] = {}
        self._pinned: frozenset[int] = frozenset()
        self._leaving: set[int] = set()  # removed by their users while requests still name them
        self._unsure = False

    def version(self, lora_id: int) -> str | None:
        """The digest of what is held under an id; None when nothing is."""
        held = self._held.get(lora_id)
        return held.version if held is not None else None

    def held(self, lora_id: int) -> Held | None:
        """What is held under an id."""
        return self._held.get(lora_id)

    def ids(self) -> set[int]:
        """What is held, and was not removed."""
        self._refresh()
        return set(self._held) - self._leaving

    def add(self, adapter: Adapter, source: Any = None) -> list[int]:
        """Has an adapter loaded, if it is not held already or is to be replaced.

        Args:
            source: its tensors; None: they are in a folder.
        Returns:
            Ids of the adapters that were evicted for it.
        Raises:
            AdapterError: it cannot be served; whatever was held before still is.
        """
        self._refresh()
        lora_id = adapter.lora_int_id
        self._make_way(adapter)
        held = self._held.get(lora_id)
        if held is not None and not adapter.load_inplace and source is None:
            self._check_same(adapter, held)
            self._leaving.discard(lora_id)
            self._check_slot(lora_id)
            return []
        replaceable = source is None and lora_id not in self._leaving
        if held is not None and held.name != adapter.lora_name and not replaceable:
            raise _id_in_use(adapter, held)
        self._check_slot(lora_id)
        if source is None and from_memory(lora_id):
            raise AdapterError(
                "not_found", "this adapter was handed over as tensors and is no longer loaded",
                seen=adapter.lora_name, fix="hand it over again with add_adapter",
            )  # fmt: skip
        return self._load(adapter, source)

    def reads(self, adapter: Adapter, source: Any) -> bool:
        """Whether `add` would have the workers read an adapter."""
        return source is not None or adapter.load_inplace or adapter.lora_int_id not in self._held

    def remove(self, lora_id: int) -> bool:
        """Drops an adapter; one that unfinished requests name, as soon as they are done."""
        if lora_id in self._held and lora_id in self._named():
            self._leaving.add(lora_id)
            return True
        return self._drop(lora_id)

    def tidy(self) -> None:
        """Drops what was removed and is no longer named. To be called before every step."""
        self._refresh()
        if self._leaving:
            for lora_id in self._leaving - self._named():
                self._drop(lora_id)

    def pin(self, lora_id: int) -> bool:
        """Keeps an adapter in its slot for good.

        Raises:
            AdapterError: `not_found`; `slots_pinned` when requests that the engine has taken on
                need the slot.
        """
        self._refresh()
        held = self._held.get(lora_id)
        if held is None:
            raise AdapterError(
                "not_found", "an adapter that is not loaded cannot be pinned", seen=lora_id,
                fix="load it first",
            )  # fmt: skip
        if not held.parts:
            raise incomplete(held.name, held.understands)
        if held.pinned:
            return True
        pinned = self._pinned | {lora_id}
        free = self._slots - len(pinned)
        if (
            free < 0
            or (free == 0 and self._named() - pinned)
            or len(self._running() - pinned) > free
        ):
            raise self._slots_pinned("the slot is needed by requests that are not finished")
        done = all(self._rpc("pin_lora", lora_id))
        held.pinned = done
        self._pin()
        return done

    def admits(self, lora_id: int) -> bool:
        """Whether a request for an adapter may join those that are being computed.

        The pinned adapters have their slots in every step; the scheduler does not know.
        """
        if not self._pinned or lora_id in self._pinned:
            return True
        others = self._running() - self._pinned
        return lora_id in others or len(others) < self._slots - len(self._pinned)

    def doubt(self) -> None:
        """Somebody called the workers behind the ledger's back: it asks them before it answers."""
        self._unsure = True

    def _refresh(self) -> None:
        if not self._unsure:
            return
        self._unsure = False
        ranks: list[dict[int, Any]] = self._rpc(VERSIONS)
        held_by_all = set(ranks[0]).intersection(*ranks[1:])
        for lora_id in set(self._held) - held_by_all:
            self._forget(lora_id)
            self._lose(lora_id, AdapterError(
                "not_found", "the adapter was taken from the workers", seen=lora_id,
                fix="load it again",
            ))  # fmt: skip
        for lora_id, report in ranks[0].items():
            held = self._held.get(lora_id)
            if held is not None and held.version != report.version:
                held.version, held.bytes = report.version, report.bytes
                held.parts, held.understands = report.parts, report.understands
                self._replaced(lora_id)

    def _make_way(self, adapter: Adapter) -> None:
        """A derived adapter's id follows from what it is made of: another's may be the same."""
        lora_id, held = adapter.lora_int_id, self._held.get(adapter.lora_int_id)
        other = held is not None and held.path != adapter.lora_path
        if lora_id >= DERIVED_IDS and other and lora_id not in self._named() | self._pinned:
            self._drop(lora_id)

    def _load(self, adapter: Adapter, source: Any) -> list[int]:
        lora_id = adapter.lora_int_id
        kept = set(filter(from_memory, self._held)) | self._pinned | self._named()
        answers = self._rpc(LOAD, adapter, source, frozenset(kept | {lora_id}))
        errors = [a for a in answers if isinstance(a, str)]
        reports = [a for a in answers if not isinstance(a, str)]
        evicted = set().union(*(r.evicted for r in reports)) - {lora_id}
        for other in evicted:
            self._forget(other)
            if errors or any(other not in r.evicted for r in reports):
                self._rpc("remove_lora", other)  # every worker holds the same
        if len({r.version for r in reports}) > 1:
            errors.append(str(AdapterError(
                "ranks_differ", "the workers read different files under the adapter's path",
                seen=adapter.lora_path, fix="give every machine the same files",
            )))  # fmt: skip
        if errors:
            error = AdapterError.parse(errors[0])
            assert error is not None, errors[0]
            if reports:  # some workers hold it, some do not, or not the same
                self._drop(lora_id)
                self._lose(lora_id, error)
            raise error
        self._note(adapter, reports)
        return sorted(evicted)

    def _note(self, adapter: Adapter, reports: list[Any]) -> None:
        lora_id, before = adapter.lora_int_id, self._held.get(adapter.lora_int_id)
        self._leaving.discard(lora_id)
        first, version = reports[0], reports[0].version
        self._held[lora_id] = Held(
            adapter.lora_name, adapter.lora_path, version, max(r.bytes for r in reports),
            first.parts, first.understands,
        )  # fmt: skip
        if before is not None and before.pinned:
            self._held[lora_id].pinned = all(self._rpc("pin_lora", lora_id))
        self._pin()
        if before is not None and before.version != version:
            self._replaced(lora_id)

    def _drop(self, lora_id: int) -> bool:
        self._forget(lora_id)
        return all(self._rpc("remove_lora", lora_id))

    def _lose(self, lora_id: int, error: AdapterError) -> None:
        if lora_id in self._named():
            self._lost(lora_id, error)

    def _forget(self, lora_id: int) -> None:
        self._held.pop(lora_id, None)
        self._leaving.discard(lora_id)
        self._pin()

    def _pin(self) -> None:
        self._pinned = frozenset(i for i, held in self._held.items() if held.pinned)

    def _check_same(self, adapter: Adapter, held: Held) -> None:
        if (held.name, held.path) != (adapter.lora_name, adapter.lora_path):
            raise _id_in_use(adapter, held)

    def _check_slot(self, lora_id: int) -> None:
        if lora_id not in self._pinned and len(self._pinned) >= self._slots:
            raise self._slots_pinned("every adapter slot is pinned to another adapter")

    def _slots_pinned(self, message: str) -> AdapterError:
        return AdapterError(
            "slots_pinned", message, seen=f"{len(self._pinned)} pinned", limit=self._slots,
            fix="start with a larger --max-loras, or remove a pinned adapter",
        )  # fmt: skip


def incomplete(name: str, understands: dict[str, Any]) -> AdapterError:
    """The error for a template where an adapter must stand."""
    needs = [what for what in ("user", "instruction") if understands.get(what)]
    return AdapterError(
        "missing_setting", f"adapter {name} needs what only a request can say", seen="none",
        limit=f"lora_ext with {' and '.join(needs)}", fix="send it with the request",
    )  # fmt: skip


def _id_in_use(adapter: Adapter, held: Held) -> AdapterError:
    return AdapterError(
        "id_in_use", f"lora_int_id {adapter.lora_int_id} already belongs to another adapter",
        seen=f"{adapter.lora_name} at {adapter.lora_path}", limit=f"{held.name} at {held.path}",
        fix="give every adapter its own id, or set load_inplace",
    )  # fmt: skip
