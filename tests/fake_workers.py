"""Workers that hold adapters in dicts, and the ledger that keeps their book."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.ledger import LOAD, VERSIONS, Ledger
from vllm_lora_ext.model_patches.loading import FORGET, PREPARE, PREPARED
from vllm_lora_ext.model_patches.residency import KeyedPart, Prepared
from vllm_lora_ext.model_patches.traffic import STATS, Traffic
from vllm_lora_ext.model_patches.turns import Turns


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str = "/a"
    load_inplace: bool = False


@dataclass(frozen=True)
class Report:
    version: str
    bytes: int = 8
    system: str = "plain"
    rank: int = 4
    evicted: tuple[int, ...] = ()
    parts: tuple[KeyedPart, ...] = ()
    understands: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rank:
    """A worker: `files` is what lies under each path, `room` how many adapters it may hold.

    `made_of` says of a version what stands in its slot, where that is more than itself.
    """

    files: dict[str, str]
    room: int = 99
    held: dict[int, str] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    reading: dict[int, Any] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    slow: set[int] = field(default_factory=set)  # still being read
    made_of: dict[str, tuple[KeyedPart, ...]] = field(default_factory=dict)

    def call(self, method: str, *args: Any) -> Any:
        return {
            LOAD: self.load, VERSIONS: self.versions, "remove_lora": self.remove,
            "pin_lora": self.pin, PREPARE: self.prepare, PREPARED: self.prepared,
            FORGET: self.forget, STATS: self.stats,
        }[method](*args)  # fmt: skip

    def load(self, request: Request, source: Any, in_use: frozenset[int]) -> Any:
        if request.lora_int_id in self.held and not request.load_inplace and source is None:
            return self._report(self.held[request.lora_int_id])
        ahead = self.reading.pop(request.lora_int_id, None)
        assert ahead or not isinstance(source, Prepared)
        version = ahead or source or self.files.get(request.lora_path)
        if version is None:
            return str(AdapterError("not_found", "no such folder", seen=request.lora_path))
        others = [i for i in self.held if i not in in_use]
        out = []
        while len(set(self.held) - {request.lora_int_id}) >= self.room:
            if not others:
                return str(AdapterError("host_cache_full", "no room"))
            out.append(others.pop(0))
            del self.held[out[-1]]
        self.held[request.lora_int_id] = version
        return self._report(version, tuple(out))

    def _report(self, version: str, evicted: tuple[int, ...] = ()) -> Report:
        parts = self.made_of.get(version, (KeyedPart(version),))
        understands = {
            "columns": [c.to_dict() for c in parts[0].columns] if len(parts) == 1 else [],
            "user": None if parts else 4, "instruction": False,
        }  # fmt: skip
        return Report(version, evicted=evicted, parts=parts, understands=understands)

    def prepare(self, request: Request, source: Any) -> None:
        assert request.lora_int_id not in self.reading, "one after the other"
        given = source and source.tensors.decode()
        self.reading[request.lora_int_id] = given or self.files.get(request.lora_path)

    def prepared(self, lora_id: int) -> bool:
        return lora_id not in self.slow

    def forget(self, lora_id: int) -> None:
        self.reading.pop(lora_id, None)

    def stats(self) -> dict[str, Any]:
        return {
            "active": tuple(self.held)[:2], "slots": 2, "resident_bytes": 8 * len(self.held),
            "experts": {"a": [1.5, 0.5]},
            "limit_bytes": 800, "traffic": asdict(self.traffic),
        }  # fmt: skip

    def versions(self) -> dict[int, Report]:
        return {i: self._report(v) for i, v in self.held.items()}

    def remove(self, lora_id: int) -> bool:
        self.pinned.discard(lora_id)
        return self.held.pop(lora_id, None) is not None

    def pin(self, lora_id: int) -> bool:
        assert lora_id in self.held
        self.pinned.add(lora_id)
        return True


class Engine:
    """Two ranks, and requests that are nothing but ids."""

    def __init__(self, files: dict[str, str], slots: int = 2, room: int = 99) -> None:
        self.slots = slots
        self.ranks = [Rank(dict(files), room), Rank(dict(files), room)]
        self.named: set[int] = set()
        self.running: set[int] = set()
        self.calls: list[str] = []
        self.replaced: list[int] = []
        self.lost: list[tuple[int, str]] = []
        self.ledger = Ledger(
            self.rpc, slots, lambda: set(self.named), lambda: set(self.running),
            self.replaced.append, lambda i, error: self.lost.append((i, error.code)),
        )  # fmt: skip

    def rpc(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        return [rank.call(method, *args) for rank in self.ranks]

    def admits(self, at: int) -> bool:
        """Whether a request joins those that run."""

        def asks(at: int) -> Any:
            return SimpleNamespace(lora_request=Request("", at))

        scheduler = SimpleNamespace(running=[*map(asks, self.running)], policy="fcfs")
        turns = Turns(scheduler, self.slots, 1.0)
        return turns.admits(asks(at), self.ledger.pinned)

    def write(self, path: str, version: str) -> None:
        """What lies there from now on."""
        for rank in self.ranks:
            rank.files[path] = version

    def code(self, call: Any, *args: Any) -> str:
        with pytest.raises(AdapterError) as caught:
            call(*args)
        return caught.value.code

    def same(self) -> set[int]:
        """Adapters that the ranks hold: the same, and what the ledger says."""
        assert self.ranks[0].held == self.ranks[1].held
        for at, version in self.ranks[0].held.items():
            held = self.ledger.held(at)
            assert held is not None and held.version == version
        return self.ledger.ids()

    def version(self, lora_id: int) -> str | None:
        """What new requests get."""
        held = self.ledger.current(lora_id)
        return None if held is None else held.version
