"""Several engine cores behind one front end: all change, or none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fake_workers import Engine, Request

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import data_parallel
from vllm_lora_ext.model_patches.core_calls import ADD, ROLL_BACK, STATE, TAKE_BACK


class Core(Engine):
    """A core that answers what `CoreAdapters` does."""

    def answer(self, method: str, *args: Any) -> Any:
        if method == TAKE_BACK:
            return self.ledger.take_back(args[0].lora_int_id, *args[1:])
        lora, before = args[0], self.ledger.last(args[0].lora_int_id)
        try:
            evicted = {ADD: self.ledger.add, ROLL_BACK: self._roll_back}[method](*args) or []
        except AdapterError as error:
            return {"error": str(error)}
        version = self.version(lora.lora_int_id)
        return {"version": version, "path": lora.lora_path, "evicted": evicted, "before": before,
                "read": lora.load_inplace}  # fmt: skip

    def _roll_back(self, lora: Request, version: str, expected: str | None) -> None:
        self.ledger.roll_back(lora, version, expected)

    def read(self, version: str | None) -> None:
        """What lies in the folder from now on."""
        for rank in self.ranks:
            rank.files = {"/a": version} if version else {}


@pytest.fixture
def cores() -> list[Core]:
    return [Core({"/a": "v1"}), Core({"/a": "v1"}), Core({"/a": "v1"})]


def client(cores: list[Core]) -> Any:
    async def call(method: str, *args: Any, engine: int) -> Any:
        await asyncio.sleep(0)
        return cores[engine].answer(method, *args)

    return SimpleNamespace(_call_utility_async=call, core_engines=list(range(len(cores))))


def change(cores: list[Core], *call: Any) -> dict[str, Any]:
    return asyncio.run(data_parallel.change(client(cores), *call))


def code(reply: dict[str, Any]) -> str:
    error = AdapterError.parse(reply["error"])
    assert error is not None
    return error.code


def versions(cores: list[Core]) -> list[str | None]:
    return [core.version(1) for core in cores]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_first_load_that_one_core_refuses_is_nowhere(cores, wrong):
    cores[wrong].read(None)
    assert code(change(cores, ADD, Request("a", 1))) == "not_found"
    assert versions(cores) == [None] * 3 and [core.same() for core in cores] == [set()] * 3
    cores[wrong].read("v1")
    assert change(cores, ADD, Request("a", 1), None, None)["version"] == "v1"
    assert versions(cores) == ["v1"] * 3


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_next_version_that_one_core_refuses_leaves_the_old_one(cores, wrong):
    change(cores, ADD, Request("a", 1))
    for core in cores:
        core.read("v2")
    cores[wrong].read(None)
    assert code(change(cores, ADD, Request("a", 1, load_inplace=True))) == "not_found"
    assert versions(cores) == ["v1"] * 3
    cores[wrong].read("v2")
    again = change(cores, ADD, Request("a", 1, load_inplace=True), None, "v1")
    assert again["version"] == "v2" and versions(cores) == ["v2"] * 3


def test_cores_that_read_different_files_serve_none_of_them(cores):
    change(cores, ADD, Request("a", 1))
    cores[2].read("v2")
    assert code(change(cores, ADD, Request("a", 1, load_inplace=True))) == "files_changed"
    assert versions(cores) == ["v1"] * 3


def test_an_evicted_version_is_expected_as_before_and_not_served(cores):
    change(cores, ADD, Request("a", 1))
    cores[0].ledger._drop(1)
    cores[0].read("v2")
    cores[1].read(None)
    assert code(change(cores, ADD, Request("a", 1, load_inplace=True))) == "not_found"
    assert versions(cores) == [None, "v1", "v1"] and cores[0].ledger.last(1) == "v1"


def test_a_rollback_is_all_cores_or_none_of_them(cores):
    change(cores, ADD, Request("a", 1))
    for core in cores:
        core.named = {1}  # keeps v1
        core.read("v2")
    change(cores, ADD, Request("a", 1, load_inplace=True))
    assert change(cores, ROLL_BACK, Request("a", 1), "v1", "v2")["version"] == "v1"
    assert versions(cores) == ["v1"] * 3
    change(cores, ROLL_BACK, Request("a", 1), "v2", None)
    cores[1].named = set()
    cores[1].ledger._drop(1)
    assert code(change(cores, ROLL_BACK, Request("a", 1), "v1", None)) == "not_found"
    assert versions(cores) == ["v2"] * 3


def test_what_came_after_is_not_taken_back(cores):
    core = cores[0]
    core.ledger.add(Request("a", 1))
    core.read("v3")
    core.ledger.add(Request("a", 1, load_inplace=True))
    core.ledger.take_back(1, "v2", "v1")
    assert core.version(1) == "v3"


def row(lora_id: int, **more: Any) -> dict[str, Any]:
    return {"id": lora_id, "version": "v", "pinned": True, "residency": "host", "in_flight": 1,
            "older": [], **more}  # fmt: skip


def test_numbers_are_of_all_cores():
    first = {
        "adapters": [
            row(2, residency="none"), row(1, older=[{"version": "u", "in_flight": 1}]),
        ],
        "slots": 4,
        "slots_used": 1, "resident_bytes": 10, "limit_bytes": 100, "counts": {"steps": 3},
        "experts": {"a": [1.0, 2.0]},
    }  # fmt: skip
    second = {
        "adapters": [row(1, pinned=False, residency="slot", in_flight=2, older=[
            {"version": "u", "in_flight": 3}, {"version": "t", "in_flight": 0},
        ]), row(2)],
        "slots": 4, "slots_used": 2, "resident_bytes": 5, "limit_bytes": 100,
        "counts": {"steps": 4}, "experts": {"a": [0.5, 0.5], "b": [1.0]},
    }  # fmt: skip
    cores = {b"0": first, b"1": second}

    async def call(method: str, count: bool, engine: bytes) -> Any:
        assert method == STATE and count
        return cores[engine]

    asked = SimpleNamespace(_call_utility_async=call, core_engines=list(cores))
    older = [{"version": "u", "in_flight": 4}, {"version": "t", "in_flight": 0}]
    assert data_parallel.whole(asyncio.run(data_parallel.ask(asked, STATE, True))) == {
        "slots": 8, "slots_used": 3, "resident_bytes": 15, "limit_bytes": 200,
        "counts": {"steps": 7}, "experts": {"a": [1.5, 2.5], "b": [1.0]},
        "adapters": [
            row(1, pinned=False, residency="slot", in_flight=3, older=older),
            row(2, in_flight=2),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("turn", [1, -1])
def test_cores_that_have_traced_versions_of_other_experts_are_summed(turn):
    """Each knows the experts of what it has traced; the longer list may be either's."""
    state = {"adapters": [], "slots": 1, "slots_used": 0, "resident_bytes": 0, "limit_bytes": 0,
             "counts": {"steps": 1}}  # fmt: skip
    states = [{**state, "experts": {"a": sums}} for sums in ([1.0, 2.0], [0.5, 0.5, 3.0])[::turn]]
    found = data_parallel.whole(states)
    assert (found["experts"], found["counts"]) == ({"a": [1.5, 2.5, 3.0]}, {"steps": 2})
