"""The core's book of adapters, against workers that are made of dicts."""

from __future__ import annotations

import pytest
from fake_workers import Engine, Request

from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.held import MEMORY_IDS


@pytest.fixture
def engine() -> Engine:
    return Engine({"/a": "v1", "/b": "w1"})


def test_a_held_adapter_costs_no_call(engine):
    assert engine.ledger.add(Request("a", 1)) == []
    assert (engine.version(1), engine.version(2)) == ("v1", None)
    engine.calls.clear()
    assert engine.ledger.add(Request("a", 1)) == []
    engine.ledger.tidy()
    assert engine.calls == []


def test_an_id_is_one_adapters(engine):
    engine.ledger.add(Request("a", 1))
    assert engine.code(engine.ledger.add, Request("b", 1, "/b")) == "id_in_use"
    engine.ledger.add(Request("b", 1, "/b", load_inplace=True))
    assert engine.version(1) == "w1" and engine.replaced == []


def test_the_same_content_replaces_nothing(engine):
    engine.ledger.add(Request("a", 1))
    engine.ledger.add(Request("a", 1, load_inplace=True))
    assert engine.replaced == []


def test_a_failed_load_leaves_what_was_there(engine):
    engine.ledger.add(Request("a", 1))
    assert engine.code(engine.ledger.add, Request("a", 1, "/gone", True)) == "not_found"
    assert engine.same() == {1} and engine.version(1) == "v1"


def test_what_one_worker_alone_could_load_is_held_by_none(engine):
    """Another machine's disk: the request ends with an error."""
    engine.ranks[1].files.clear()
    assert engine.code(engine.ledger.add, Request("a", 1)) == "not_found"
    assert engine.same() == set() and engine.lost == []
    engine.ranks[1].files["/a"] = "v1"
    engine.ledger.add(Request("a", 1))
    engine.named = {1}
    engine.ranks[1].files.clear()
    assert engine.code(engine.ledger.add, Request("a", 1, load_inplace=True)) == "not_found"
    assert engine.same() == {1} and engine.lost == [], "the old version goes on"


def test_workers_that_read_different_files_are_refused(engine):
    engine.ranks[1].files["/a"] = "v2"
    assert engine.code(engine.ledger.add, Request("a", 1)) == "ranks_differ"
    assert engine.same() == set()


def test_eviction_takes_nothing_that_is_named():
    engine = Engine({"/a": "v1", "/b": "w1", "/c": "x1"}, room=2)
    engine.ledger.add(Request("a", 1))
    engine.ledger.add(Request("b", 2, "/b"))
    engine.named = {1}
    assert engine.ledger.add(Request("c", 3, "/c")) == [2]
    assert engine.same() == {1, 3}
    engine.named = {1, 3}
    assert engine.code(engine.ledger.add, Request("b", 2, "/b")) == "host_cache_full"
    assert engine.same() == {1, 3}


def test_what_one_worker_evicts_leaves_all():
    engine = Engine({"/a": "v1", "/b": "w1"}, room=2)
    engine.ranks[1].room = 1
    engine.ledger.add(Request("a", 1))
    assert engine.ledger.add(Request("b", 2, "/b")) == [1]
    assert engine.same() == {2}


@pytest.fixture
def small() -> Engine:
    """Room for one adapter; the first was evicted for the second."""
    engine = Engine({"/a": "v1", "/b": "w1"}, room=1)
    engine.ledger.add(Request("a", 1))
    assert engine.ledger.add(Request("b", 2, "/b")) == [1]
    return engine


def test_an_adapter_that_was_evicted_is_read_again(small):
    assert small.ledger.add(Request("a", 1)) == [2]
    assert small.version(1) == "v1" and small.same() == {1}


@pytest.mark.parametrize("how", ["add", "enter", "promised"])
def test_what_was_evicted_never_comes_back_as_another_version(small, how):
    small.write("/a", "v2")
    calls = {
        "add": lambda: small.ledger.add(Request("a", 1)),
        "enter": lambda: small.ledger.enter(Request("a", 1), None),
        "promised": lambda: small.ledger.enter(Request("a", 1), "v1"),
    }
    for _ in range(2):
        assert small.code(calls[how]) == "files_changed"
        assert small.version(1) is None and not small.ranks[0].held.get(1)
    assert small.ledger.last(1) == "v1"
    small.write("/a", "v1")
    calls[how]()
    assert small.version(1) == "v1", "the files are back"


@pytest.mark.parametrize("how", ["in place", "expected", "tensors", "removed", "another folder"])
def test_who_loads_an_evicted_adapter_anew_gets_what_is_there(small, how):
    small.write("/a", "v2")
    small.write("/c", "v2")
    if how == "removed":
        assert not small.ledger.remove(7)
        small.ledger.remove(1)
    path, inplace = "/c" if how == "another folder" else "/a", how in ("in place", "expected")
    request = Request("a", 1, path, inplace)
    small.ledger.add(
        request, "v2" if how == "tensors" else None, None, "v1" if how == "expected" else None
    )
    assert small.version(1) == "v2" and small.ledger.last(1) == "v2"


def test_what_was_evicted_for_a_load_that_failed_comes_back_as_it_was(engine):
    """Its eviction is in no answer."""
    engine.ledger.add(Request("a", 1))
    assert engine.code(engine.ledger.add, Request("x", 3, "/gone")) == "not_found"
    for rank in engine.ranks:
        rank.held.clear()
    engine.write("/a", "v2")
    assert engine.code(engine.ledger.add, Request("a", 1)) == "files_changed"


def test_what_others_took_from_the_workers_may_come_back_as_they_like(engine):
    """A trainer removes and adds through `collective_rpc`."""
    engine.ledger.add(Request("a", 1))
    for rank in engine.ranks:
        rank.held.clear()
    engine.ledger.doubt()
    engine.write("/a", "v2")
    engine.ledger.add(Request("a", 1))
    assert engine.version(1) == "v2"


def test_evictions_for_requests_are_counted_and_told(small):
    """A front end hears of them with its next answer."""
    small.ledger.enter(Request("a", 1), None)  # for it 2 goes
    assert small.ledger.evicted == {"adapters_evicted": 2, "derived_adapters_evicted": 0}
    assert small.ledger.add(Request("a", 1)) == [2]
    assert small.ledger.add(Request("a", 1)) == []
    small.ledger.enter(Request("b", 2, "/b"), None)
    small.ledger.enter(Request("a", 1), None)
    assert small.ledger.add(Request("a", 1)) == [2], "1 is here again"
    assert small.ledger.evicted["adapters_evicted"] == 4


def test_removed_while_in_use_goes_with_its_last_request(engine):
    engine.ledger.add(Request("a", 1))
    engine.named = {1}
    assert engine.ledger.remove(1)
    assert engine.ledger.ids() == set() and engine.ranks[0].held == {1: "v1"}
    engine.ledger.tidy()
    assert engine.ranks[0].held == {1: "v1"}
    engine.named = set()
    engine.ledger.tidy()
    assert engine.same() == set()
    assert not engine.ledger.remove(1)


def test_removed_and_added_again_stays(engine):
    engine.ledger.add(Request("a", 1))
    engine.named = {1}
    engine.ledger.remove(1)
    assert engine.code(engine.ledger.add, Request("b", 1, "/b", True)) == "id_in_use"
    engine.ledger.add(Request("a", 1))
    engine.named = set()
    engine.ledger.tidy()
    assert engine.same() == {1}


def test_removed_and_added_again_is_read_again(engine):
    """What a folder holds by then, as without a request under way."""
    engine.ledger.add(Request("a", 1))
    engine.named = {1}
    assert engine.ledger.remove(1)
    for rank in engine.ranks:
        rank.files["/a"] = "v2"
    engine.ledger.add(Request("a", 1), expected=None)
    assert engine.version(1) == "v2"
    engine.ledger.check_expected(Request("a", 1), "v2")
    assert "v1" in engine.ranks[0].held.values(), "the request goes on with it"
    engine.named = set()
    engine.ledger.tidy()
    assert list(engine.ranks[0].held.values()) == ["v2"]


def test_all_slots_pinned_refuses_one_more(engine):
    for number, name in ((1, "/a"), (2, "/b")):
        engine.ledger.add(Request(name, number, name))
        assert engine.ledger.pin(number)
    assert engine.code(engine.ledger.add, Request("c", 3, "/a")) == "slots_pinned"
    engine.ledger.add(Request("/a", 1))
    assert engine.same() == {1, 2}
    engine.ledger.remove(2)
    engine.ledger.add(Request("c", 3, "/a"))


def test_a_held_adapter_without_a_slot_is_refused(engine):
    """Its requests would wait for ever."""
    engine.ledger.add(Request("c", 3, "/a"))
    for number, name in ((1, "/a"), (2, "/b")):
        engine.ledger.add(Request(name, number, name))
        engine.ledger.pin(number)
    assert engine.code(engine.ledger.add, Request("c", 3, "/a")) == "slots_pinned"


def test_no_slot_is_pinned_away_from_a_request(engine):
    for number, name in ((1, "/a"), (2, "/b"), (3, "/a")):
        engine.ledger.add(Request(name, number, name))
    assert engine.ledger.pin(1)
    engine.named = {3}
    assert engine.code(engine.ledger.pin, 2) == "slots_pinned"
    engine.named = {2}
    assert engine.ledger.pin(2)
    assert engine.ranks[0].pinned == {1, 2}
    assert engine.code(engine.ledger.pin, 7) == "not_found"


def test_pins_wait_for_steps_that_are_full(engine):
    for number, name in ((1, "/a"), (2, "/b"), (3, "/a")):
        engine.ledger.add(Request(name, number, name))
    engine.named = engine.running = {2, 3}
    assert engine.code(engine.ledger.pin, 1) == "slots_pinned"
    assert engine.ledger.pin(2)


def test_steps_take_no_more_than_the_pinned_leave():
    engine = Engine({"/a": "v"}, slots=3)
    for number in range(1, 6):
        engine.ledger.add(Request("a", number))
    assert all(engine.admits(n) for n in range(1, 6))
    engine.ledger.pin(1)
    engine.running = {1, 2}
    assert [engine.admits(n) for n in (1, 2, 3)] == [True, True, True]
    engine.running = {2, 3}
    assert [engine.admits(n) for n in (1, 2, 3, 4)] == [True, True, True, False]


def test_a_pinned_adapter_stays_pinned_when_it_is_replaced(engine):
    engine.ledger.add(Request("a", 1))
    engine.ledger.pin(1)
    for rank in engine.ranks:
        rank.files["/a"] = "v2"
    engine.ledger.add(Request("a", 1, load_inplace=True))
    (at,) = engine.ranks[0].pinned
    assert engine.ranks[0].held == {at: "v2"}, "the old version has left its slot"


def test_a_pinned_adapter_waits_for_the_requests_of_its_old_version(engine):
    """Two slots, both pinned: the new version has none before the old one leaves."""
    for number, name in ((1, "/a"), (2, "/b")):
        engine.ledger.add(Request(name, number, name))
        engine.ledger.pin(number)
    engine.named = engine.running = {1}
    for rank in engine.ranks:
        rank.files["/a"] = "v2"
    engine.ledger.add(Request("/a", 1, load_inplace=True))
    new = engine.ledger.enter(Request("/a", 1), "v2")
    assert not engine.admits(new) and engine.admits(1)
    engine.ledger.tidy()
    assert engine.ranks[0].pinned == {1, 2}
    engine.named = {new}
    engine.running = set()
    engine.ledger.tidy()
    assert engine.ranks[0].pinned == {new, 2} and engine.admits(new)
    assert engine.ranks[0].held == {new: "v2", 2: "w1"}


def test_a_pin_is_passed_on_over_any_number_of_versions(engine):
    """The first one's request still runs, and so many came after it that no rollback reaches it."""
    for number, name in ((1, "/a"), (2, "/b")):
        engine.ledger.add(Request(name, number, name))
        engine.ledger.pin(number)
    engine.named = engine.running = {1}
    for version in ("v2", "v3", "v4", "v5"):
        engine.write("/a", version)
        engine.ledger.add(Request("/a", 1, load_inplace=True))
        new = engine.ledger.enter(Request("/a", 1), version)
        engine.named = engine.named | {new}
        assert engine.ledger.pinned == engine.ranks[0].pinned == {1, 2}
    engine.named, engine.running = {new}, set()
    engine.ledger.tidy()
    assert engine.ledger.pinned == engine.ranks[0].pinned == {new, 2}


def test_a_pin_is_not_lost_to_an_adapter_that_needs_room():
    """The next version waits for its slot: host memory keeps it meanwhile."""
    engine = Engine({"/a": "v1", "/c": "x1"}, slots=2, room=2)
    engine.ledger.add(Request("a", 1))
    engine.ledger.pin(1)
    engine.named = engine.running = {1}
    engine.write("/a", "v2")
    engine.ledger.add(Request("a", 1, load_inplace=True))
    assert engine.code(engine.ledger.add, Request("c", 3, "/c")) == "host_cache_full"
    engine.named = engine.running = set()
    engine.ledger.tidy()
    (new,) = engine.ledger.pinned
    assert engine.ranks[0].held[new] == "v2"


def test_from_memory(engine):
    tensors = Request("t", MEMORY_IDS + 5, "memory:t", load_inplace=True)
    assert engine.code(engine.ledger.add, tensors) == "not_found"
    engine.ledger.add(tensors, "m1")
    engine.ledger.add(tensors, "m2")
    assert engine.version(MEMORY_IDS + 5) == "m2"
    other = Request("u", MEMORY_IDS + 5, "memory:u", load_inplace=True)
    assert engine.code(engine.ledger.add, other, "m3") == "id_in_use"


@pytest.mark.parametrize("lora_id", [MEMORY_IDS + 5, DERIVED_IDS + 5, 0x7FFFFFFE])
def test_users_take_ids_of_any_size(engine, lora_id):
    """Trainers take clocks modulo 2**31; what an adapter is, its path says."""
    engine.ledger.add(Request("a", lora_id))
    assert [row["id"] for row in engine.ledger.listing((), {}, True)] == [lora_id]
    for rank in engine.ranks:
        rank.files["/a"] = "v2"
    engine.ledger.add(Request("a", lora_id, load_inplace=True), expected="v1")
    assert engine.version(lora_id) == "v2"
    derived = Request("mix", lora_id, "lora_ext:{}")
    assert engine.code(engine.ledger.add, derived) == "id_in_use"
    assert engine.version(lora_id) == "v2"


def test_a_failed_load_makes_sure_what_is_left(engine):
    """Something may have been evicted for it that no answer names."""
    engine.ledger.add(Request("a", 1))
    assert engine.code(engine.ledger.add, Request("x", 3, "/gone")) == "not_found"
    for rank in engine.ranks:
        rank.held.clear()
    assert engine.ledger.ids() == set()


def test_nobody_else_has_those_tensors(engine):
    """So they are never evicted."""
    engine.ranks[0].room = engine.ranks[1].room = 1
    engine.ledger.add(Request("t", MEMORY_IDS, "memory:t", load_inplace=True), "m1")
    assert engine.code(engine.ledger.add, Request("a", 1)) == "host_cache_full"
    assert engine.same() == {MEMORY_IDS}


def test_workers_that_were_called_behind_its_back_are_asked(engine):
    for number, name in ((1, "/a"), (2, "/b")):
        engine.ledger.add(Request(name, number, name))
    for rank in engine.ranks:
        rank.held = {1: "v9", 7: "z"}
    engine.named = {1, 2}
    assert engine.version(1) == "v1"
    engine.ledger.doubt()
    engine.ledger.tidy()
    assert engine.version(1) == "v9" and engine.replaced == [1]
    assert engine.lost == [(2, "not_found")]
    engine.calls.clear()
    engine.ledger.tidy()
    assert engine.calls == []
    engine.ledger.add(Request("z", 7, "/nowhere"))  # they hold it already
    assert engine.version(7) == "z"


def test_what_others_hand_to_the_workers_is_listed_and_stays(engine):
    """Tools of reinforcement learning ask `list_loras` whether the workers have their adapter."""
    for rank in engine.ranks:
        rank.held[7], rank.room = "trained", 2
    assert engine.ledger.ids() == set()
    engine.ledger.doubt()
    assert engine.ledger.ids() == {7}
    engine.ledger.add(Request("a", 1))
    assert engine.ledger.add(Request("b", 2, "/b")) == [1]  # 7 is nowhere to be read again
    engine.ledger.add(Request("rl", 7, "dummy"))
    engine.ledger.add(Request("a", 1))
    assert engine.version(7) == "trained" and engine.same() == {1, 7}
    assert engine.ledger.remove(7) and engine.ledger.ids() == {1}


def test_what_only_one_worker_was_handed_is_not_there(engine):
    engine.ranks[0].held[7] = "trained"
    engine.ledger.doubt()
    assert engine.ledger.ids() == set()


class Replacing:
    """An engine whose adapter 1 goes through versions."""

    def __init__(self) -> None:
        self.engine = Engine({"/a": "v1"})
        self.ledger = self.engine.ledger
        self.ledger.add(Request("a", 1))

    def replace(self, version: str, expected: str | None = None) -> None:
        for rank in self.engine.ranks:
            rank.files["/a"] = version
        self.ledger.add(Request("a", 1, load_inplace=True), None, None, expected)

    def held(self) -> set[str]:
        return set(self.engine.ranks[0].held.values())


def test_requests_keep_the_version_they_came_in_with():
    r = Replacing()
    old = r.ledger.enter(Request("a", 1), None)
    r.engine.named = {old}
    for version in ("v2", "v3", "v4", "v5", "v6"):
        r.replace(version)
    new = r.ledger.enter(Request("a", 1), None)
    assert new != old and r.ledger.held(old).version == "v1" and r.ledger.held(new).version == "v6"
    assert r.ledger.enter(Request("a", 1), "v5") not in (old, new), "as it was promised"
    r.ledger.tidy()
    assert r.held() == {"v1", "v4", "v5", "v6"}
    r.engine.named = set()
    r.ledger.tidy()
    assert r.held() == {"v4", "v5", "v6"}, "two older ones stay for a rollback"


def test_a_version_that_cannot_be_had_any_more():
    r = Replacing()
    for version in ("v2", "v3", "v4", "v5"):
        r.replace(version)
    assert r.engine.code(r.ledger.enter, Request("a", 1), "v1") == "adapter_changed"
    assert r.engine.version(1) == "v5"
    r.ledger.remove(1)
    assert r.held() == set()
    assert r.engine.code(r.ledger.enter, Request("a", 1), "v5") == "not_found"
    assert r.ledger.enter(Request("a", 1), None) == 1, "nobody was promised anything"


def test_compare_and_swap():
    r = Replacing()
    r.replace("v2", "v1")
    assert r.engine.code(r.replace, "v3", "v1") == "version_conflict"
    assert r.engine.version(1) == "v2" and r.held() == {"v1", "v2"}
    r.replace("v3", "v2")
    for rank in r.engine.ranks:  # evicted: what it was is known
        rank.held.clear()
    r.ledger.doubt()
    r.replace("v4", "v3")
    other = Request("b", 2)
    assert r.engine.code(r.ledger.add, other, None, None, "v1") == "version_conflict"
    assert "b" not in r.held()


def test_roll_back():
    r = Replacing()
    r.replace("v2")
    r.engine.named = {r.ledger.enter(Request("a", 1), None)}
    calls = len(r.engine.calls)
    r.ledger.roll_back(Request("a", 1), "v1", "v2")
    assert r.engine.version(1) == "v1" and len(r.engine.calls) == calls, "nothing is read"
    assert r.engine.code(r.ledger.roll_back, Request("a", 1), "v2", "v2") == "version_conflict"
    assert r.engine.code(r.ledger.roll_back, Request("a", 1), "v9", None) == "not_found"
    r.ledger.roll_back(Request("a", 1), "v2", None)
    assert r.engine.version(1) == "v2" and r.held() == {"v1", "v2"}


def test_an_eviction_undoes_no_rollback():
    """The folder holds the version from before the rollback."""
    r = Replacing()
    r.replace("v2")
    for rank in r.engine.ranks:
        rank.files["/b"], rank.room = "w1", 2
    r.ledger.roll_back(Request("a", 1), "v1", "v2")
    r.ledger.add(Request("b", 2, "/b"))
    for rank in r.engine.ranks:
        rank.room = 1
    assert r.engine.code(r.ledger.add, Request("c", 3, "/b")) == "host_cache_full"
    assert r.engine.version(1) == "v1" and "v1" in r.held()
    for rank in r.engine.ranks:
        rank.room = 3
    r.replace("v3")
    for rank in r.engine.ranks:
        rank.room = 1
    assert 1 in r.ledger.add(Request("c", 3, "/b")), "which can be read again"


def test_what_was_undone_is_not_read_from_a_folder_that_was_overwritten():
    """Its weights were evicted before another core refused the next version."""
    r = Replacing()
    for rank in r.engine.ranks:
        rank.files["/b"], rank.room = "w1", 1
    r.ledger.add(Request("b", 2, "/b"))
    r.replace("v2")
    r.ledger.take_back(1, "v2", "v1")
    assert r.engine.code(r.ledger.enter, Request("a", 1), None) == "files_changed"


def test_a_content_that_comes_back_is_the_version_it_was():
    r = Replacing()
    r.replace("v2")
    r.replace("v1")
    assert r.ledger.enter(Request("a", 1), None) == 1 and r.held() == {"v1", "v2"}
    r.replace("v1")
    assert r.ledger.enter(Request("a", 1), None) == 1 and len(r.engine.ranks[0].held) == 2


def test_a_bad_next_version_leaves_the_old_one_in_memory():
    """Also where there is no room for both: it may be nowhere else."""
    r = Replacing()
    for rank in r.engine.ranks:
        rank.room = 1
    assert r.engine.code(r.replace, "v2") == "host_cache_full"
    assert r.engine.version(1) == "v1" and r.held() == {"v1"}


def test_the_list_of_what_is_held():
    r = Replacing()
    r.ledger.pin(1)
    r.ledger.add(Request("b", 2))
    r.replace("v2")
    (at,) = set(r.engine.ranks[0].held) - {2}
    (a, b) = r.ledger.listing({at}, {at: 3}, True)
    assert (a["name"], a["version"], a["residency"], a["in_flight"]) == ("a", "v2", "slot", 3)
    assert a["pinned"] and not b["pinned"] and (b["residency"], b["in_flight"]) == ("host", 0)
    assert a["older"] == [] and b["rank"] == 4


@pytest.mark.parametrize("touched", [False, True])
def test_the_list_of_what_was_evicted(touched):
    r = Replacing()
    r.replace("v2")
    (at,) = set(r.engine.ranks[0].held) - {1}
    r.engine.named = {1}
    for rank in r.engine.ranks:
        rank.files["/b"], rank.room = "w1", 2
    if touched:
        for rank in r.engine.ranks:
            del rank.held[at]
        r.ledger.doubt()
    r.ledger.add(Request("b", 2, "/b"))
    assert set(r.engine.ranks[0].held) == {1, 2}
    a, _ = r.ledger.listing((), {1: 2}, True)
    assert (a["name"], a["version"], a["residency"], a["in_flight"]) == ("a", "v2", "none", 0)
    assert (a["rank"], a["system"], a["bytes"], a["pinned"]) == (4, "plain", 8, False)
    assert a["older"] == [{"version": "v1", "in_flight": 2}]
    assert [row["id"] for row in r.ledger.listing((), {}, False)] == [2], "what is held"
    r.engine.named = set()
    r.ledger.remove(1)
    assert [row["id"] for row in r.ledger.listing((), {}, True)] == [2]


def test_somebody_else_writes_under_the_adapters_own_id():
    """A tool of reinforcement learning that calls the workers means the newest."""
    r = Replacing()
    r.replace("v2")
    for rank in r.engine.ranks:
        rank.held[1] = "trained"
    r.ledger.doubt()
    assert r.ledger.enter(Request("a", 1), None) == 1
    assert r.engine.version(1) == "trained" and r.engine.replaced == [1]


@pytest.mark.parametrize("ranks", [(0,), (0, 1)])
def test_a_load_that_fails_when_a_worker_holds_it_already_leaves_nothing(engine, ranks):
    """The copy into a free slot failed, say: nobody may take what stays for somebody else's."""
    for i in ranks:
        rank = engine.ranks[i]

        def load(request, source, in_use, rank=rank):
            rank.held[request.lora_int_id] = "v1"
            return str(AdapterError("load_failed", "out of memory"))

        rank.load = load
    assert engine.code(engine.ledger.add, Request("a", 1)) == "load_failed"
    assert engine.same() == set() and engine.ranks[0].held == {}
