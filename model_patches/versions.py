"""The versions of adapters: which content an adapter's id stands for, and which it stood for.

Workers hold each version under an id of its own, so that requests of two versions of one adapter
may share a step. The first version's is the adapter's own id.
"""

from __future__ import annotations

from collections.abc import Container

from vllm.lora.request import LoRARequest

from vllm_lora_ext.settings import OLDER_VERSIONS

VERSION_IDS = 1 << 29
"""Ids from here to twice as many belong to versions that came after an adapter's first."""


class OfVersion(LoRARequest):
    """An adapter's later version, under the adapter's own name.

    vLLM takes adapters of one name for one adapter, where it keeps those of a step.
    """

    @classmethod
    def of(cls, lora: LoRARequest, at: int) -> OfVersion:
        """The version that workers hold under this id."""
        fields = {name: getattr(lora, name) for name in LoRARequest.__struct_fields__}
        return cls(**{**fields, "lora_int_id": at})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and (
            (self.lora_name, self.lora_int_id) == (other.lora_name, other.lora_int_id)
        )

    def __hash__(self) -> int:
        return hash((self.lora_name, self.lora_int_id))


class Versions:
    """Of every adapter, by id: the version that new requests get, and the older ones held."""

    def __init__(self) -> None:
        self._current: dict[int, int] = {}
        self._older: dict[int, list[int]] = {}  # the oldest first
        self._count = 0

    def current(self, lora_id: int) -> int | None:
        """What new requests get; None when it is not held."""
        return self._current.get(lora_id)

    def all(self, lora_id: int) -> list[int]:
        """What is held of an adapter, the current version first, then from new to old."""
        older = reversed(self._older.get(lora_id, []))
        current = self._current.get(lora_id)
        return [*older] if current is None else [current, *older]

    def place(self, lora_id: int, taken: Container[int]) -> int:
        """An id for one more version."""
        at = lora_id
        while at in taken:
            at = VERSION_IDS + self._count % VERSION_IDS
            self._count += 1
        return at

    def switch(self, lora_id: int, at: int) -> list[int]:
        """From now on new requests get this version.

        Returns:
            Older versions of which there are too many.
        """
        older = self._older.setdefault(lora_id, [])
        before = self._current.get(lora_id)
        if before is not None and before != at:
            older.append(before)
        if at in older:
            older.remove(at)
        self._current[lora_id] = at
        surplus = older[:-OLDER_VERSIONS]
        del older[:-OLDER_VERSIONS]
        return surplus

    def forget(self, lora_id: int, at: int) -> None:
        """A version that is not held any more."""
        if self._current.get(lora_id) == at:
            del self._current[lora_id]
        older = self._older.get(lora_id, [])
        if at in older:
            older.remove(at)
        if not older:
            self._older.pop(lora_id, None)
