"""What is held of which adapter: what the engine core's ledger writes down.

An adapter is replaced by one more version beside the old one (`versions`): requests keep the one
with which they came in. `lora_id` is an adapter's id; `at` is the id under which the workers hold
one of its versions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm_lora_ext.conditions.recipe import is_recipe
from vllm_lora_ext.model_patches.held import Held
from vllm_lora_ext.model_patches.versions import Versions


class Book:
    """Adapters by id, and the versions that are held of each; `Ledger` writes it."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}
        self._versions = Versions()
        self._last: dict[int, str] = {}  # of every adapter the current version, held or evicted

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

    def older(self, lora_id: int) -> list[int]:
        """Where other versions are held."""
        current = self._versions.current(lora_id)
        return [at for at in self._versions.all(lora_id) if at != current]

    def listing(
        self, active: Collection[int], in_flight: Mapping[int, int]
    ) -> list[dict[str, Any]]:
        """What is held of each adapter, as plain values.

        Args:
            active: `at` of what is in slots; in_flight: requests by `at`.
        """
        lora_ids = {h.lora_id for h in self._held.values() if not is_recipe(h.path)}
        rows = []
        for lora_id in sorted(lora_ids):
            at, held = self._versions.current(lora_id), self.current(lora_id)
            older = [
                {"version": self._held[i].version, "in_flight": in_flight.get(i, 0)}
                for i in self.older(lora_id)
            ]
            if at is not None and held is not None:
                rows.append({
                    "id": lora_id, "name": held.name, "version": held.version, "rank": held.rank,
                    "system": held.system, "bytes": held.bytes, "pinned": held.pinned,
                    "residency": "slot" if at in active else "host",
                    "in_flight": in_flight.get(at, 0), "older": older,
                })  # fmt: skip
        return rows

    def place(self, lora_id: int) -> int:
        """Where the next version of an adapter can be loaded."""
        return self._versions.place(lora_id, self._held)

    def _is_current(self, at: int) -> bool:
        return self._versions.current(self._held[at].lora_id) == at
