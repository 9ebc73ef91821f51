"""What is held of which adapter: what the engine core's ledger writes down.

An adapter is replaced by one more version beside the old one (`versions`): requests keep the one
with which they came in. `lora_id` is an adapter's id; `at` is the id under which the workers hold
one of its versions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm_lora_ext.conditions.recipe import is_recipe
from vllm_lora_ext.model_patches.held import Adapter, Held, version_conflict
from vllm_lora_ext.model_patches.pins import Pins
from vllm_lora_ext.model_patches.versions import Versions


class Book:
    """Adapters by id, and the versions that are held of each; `Ledger` writes it.

    Args:
        pins: which of them keep their slots.
    """

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._held: dict[int, Held] = {}
        self._versions = Versions()
        self._last: dict[int, str] = {}  # of every adapter the current version, held or evicted
        self._away: dict[int, Held] = {}  # of every adapter the current version that left last

    def find(self, lora_id: int, version: str | None = None) -> int | None:
        """Where a version is held; None when it is not.

        Args:
            version: its digest; None: the current one.
        """
        if version is None:
            return self._versions.current(lora_id)
        for at in self._versions.all(lora_id):
            held = self._held.get(at)
            if held is not None and held.version == version:
                return at
        return None

    def held(self, at: int) -> Held | None:
        """What is held there."""
        return self._held.get(at)

    def current(self, lora_id: int) -> Held | None:
        """The version that new requests get."""
        at = self._versions.current(lora_id)
        return None if at is None else self._held.get(at)

    def last(self, lora_id: int) -> str | None:
        """The version that new requests got last, held or evicted."""
        held = self.current(lora_id)
        return self._last.get(lora_id) if held is None else held.version

    @property
    def pinned(self) -> frozenset[int]:
        """`at` of what has its slot in every step."""
        return self._pins.now

    def check_expected(self, adapter: Adapter, expected: str | None) -> None:
        """Raises AdapterError `version_conflict` when the current version is another one."""
        last = self._last.get(adapter.lora_int_id)
        if expected is not None and expected != last:
            raise version_conflict(adapter.lora_name, last, expected)

    def away(self, adapter: Adapter) -> Held | None:
        """What was evicted of an adapter that is asked for as it was; None when nothing was."""
        was = self._left(adapter.lora_int_id)
        if was is None or was.taken or adapter.load_inplace or was.path != adapter.lora_path:
            return None
        return was

    def _left(self, lora_id: int) -> Held | None:
        """The current version, where it is not held."""
        was = self._away.get(lora_id)
        here = self._versions.current(lora_id) is not None
        return None if here or was is None or was.version != self._last.get(lora_id) else was

    def older(self, lora_id: int) -> list[int]:
        """Where other versions are held."""
        current = self._versions.current(lora_id)
        return [at for at in self._versions.all(lora_id) if at != current]

    def listing(
        self, active: Collection[int], in_flight: Mapping[int, int], away: bool
    ) -> list[dict[str, Any]]:
        """What there is of each adapter, as plain values.

        Args:
            active: `at` of what is in slots; in_flight: requests by `at`.
            away: also adapters whose current version is not held.
        """
        lora_ids = {h.lora_id for h in self._held.values() if not is_recipe(h.path)}
        lora_ids |= self._away.keys() if away else set()
        rows = []
        for lora_id in sorted(lora_ids):
            at, held = self._versions.current(lora_id), self.current(lora_id)
            older = [
                {"version": self._held[i].version, "in_flight": in_flight.get(i, 0)}
                for i in self.older(lora_id)
            ]
            residency = "none" if held is None else "slot" if at in active else "host"
            held = held or (self._left(lora_id) if away else None)
            if held is not None:
                rows.append({
                    "id": lora_id, "name": held.name, "version": held.version, "rank": held.rank,
                    "system": held.system, "bytes": held.bytes, "pinned": at in self.pinned,
                    "residency": residency, "older": older,
                    "in_flight": 0 if at is None else in_flight.get(at, 0),
                })  # fmt: skip
        return rows

    def place(self, lora_id: int) -> int:
        """Where the next version of an adapter can be loaded."""
        return self._versions.place(lora_id, self._held)

    def _is_current(self, at: int) -> bool:
        return self._versions.current(self._held[at].lora_id) == at
