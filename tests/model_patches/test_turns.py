"""A slot for every adapter in its turn, by vLLM's own scheduler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_core import Core, lora

from vllm_lora_ext.model_patches import turns


@pytest.fixture
def now(monkeypatch) -> Iterator[list[float]]:
    time = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: time[0])
    yield time


class Crowd:
    """Requests of adapters in the slots that never end: each goes while its follower runs."""

    def __init__(self, slots: int, now: list[float], policy: str = "fcfs") -> None:
        self.core = Core({"/a": "v"}, slots=slots, slot_wait_s=1.0, policy=policy)
        self._now, self.count = now, 0
        self.more: tuple[int, ...] = ()
        self.priority: dict[int, int] = {}  # of those, by adapter; 0 where nothing is said
        self.done: list[str] = []

    def ask(self, key: str, number: int, n: int = 9, priority: int = 0) -> None:
        adapter = lora(f"n{number}", number) if number else None
        self.core.add(key, adapter, prompt=[number] * 4, n=n, priority=priority)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._now[0] += 0.1
            self.count += 1
            if self.count % 4 == 0:
                for number in self.more:
                    priority = self.priority.get(number, 0)
                    self.ask(f"more-{number}-{self.count}", number, priority=priority)
            outputs = self.core.step()
            self.done += [o.request_id for o in outputs if o.finish_reason is not None]

    def running(self) -> list[int]:
        requests = self.core.core.scheduler.running
        return sorted(r.lora_request.lora_int_id for r in requests if r.lora_request)


def test_nothing_is_held_back_before(now):
    crowd = Crowd(1, now)
    crowd.ask("long", 1, n=100)
    crowd.steps(1)
    crowd.ask("other", 2)
    crowd.steps(2)
    crowd.ask("late", 1, n=2)
    crowd.steps(5)
    assert crowd.done == ["late"]
    crowd.steps(10)
    crowd.ask("later", 1, n=2)
    crowd.ask("base", 0, n=2)
    crowd.steps(10)
    assert crowd.done == ["late", "base"], "the base model takes no slot"
    assert crowd.running() == [1], "what runs is not stopped"
    crowd.core.finish()


def test_the_adapter_with_the_fewest_requests_gives_its_slot(now):
    crowd = Crowd(2, now)
    for key, number, n in (("a", 1, 60), ("b", 1, 60), ("c", 2, 30)):
        crowd.ask(key, number, n)
    crowd.steps(1)
    crowd.ask("other", 3, n=30)
    crowd.steps(13)
    crowd.ask("d", 1, n=2)
    crowd.ask("e", 2, n=2)
    crowd.steps(5)
    assert crowd.done == ["d"], "an adapter that keeps its slot takes more"
    crowd.steps(14)
    assert crowd.done == ["d", "c"] and crowd.running() == [1, 1, 3]
    crowd.core.finish()


def test_a_turn_ends_with_who_had_it(now):
    crowd = Crowd(1, now)
    crowd.ask("long", 1, n=100)
    crowd.steps(1)
    crowd.ask("other", 2)
    crowd.steps(15)
    crowd.ask("late", 1, n=2)
    crowd.steps(5)
    assert crowd.done == []
    crowd.core.core.abort_requests(["other"])
    crowd.steps(5)
    assert crowd.done == ["late"]


@pytest.mark.parametrize(("slots", "adapters"), [(1, 2), (2, 4), (2, 6)])
def test_all_get_their_turn(now, slots, adapters):
    """Requests for more adapters than slots keep coming: none of them waits for long."""
    crowd = Crowd(slots, now)
    crowd.more = tuple(range(1, adapters + 1))
    for _ in range(4):
        crowd.done.clear()
        crowd.steps(60)
        assert {int(key.split("-")[1]) for key in crowd.done} == set(crowd.more)
    left = crowd.core.core.scheduler.requests
    assert crowd.count - min(int(key.split("-")[2]) for key in left) < 60


def test_pinned_adapters_give_nothing(now):
    crowd = Crowd(2, now)
    crowd.core.core.add_lora(lora("n1", 1))
    assert crowd.core.core.pin_lora(1)
    crowd.more = (1, 2)
    crowd.steps(8)
    crowd.ask("other", 3)
    crowd.steps(40)
    assert "other" in crowd.done


def test_who_comes_first_by_priority_is_not_held_back(now):
    crowd = Crowd(1, now, policy="priority")
    crowd.ask("long", 1, n=100)
    crowd.steps(1)
    crowd.ask("other", 2, priority=5)
    crowd.steps(15)
    crowd.ask("same", 1, n=2, priority=5)
    crowd.ask("first", 1, n=2, priority=1)
    crowd.steps(5)
    assert crowd.done == ["first"]


def test_an_adapter_that_is_pinned_meanwhile_leaves_nothing(now):
    crowd = Crowd(2, now)
    crowd.core.core.add_lora(lora("n1", 1))
    crowd.more = (1, 2)
    crowd.steps(8)
    crowd.ask("other", 3)
    crowd.steps(12)
    leaving = crowd.core.core._lora_ext.turns._leaving
    assert leaving in (1, 2)
    crowd.core.core.add_lora(lora(f"n{leaving}", leaving))
    assert crowd.core.core.pin_lora(leaving)
    crowd.done.clear()
    crowd.steps(60)
    assert "other" in crowd.done
    assert sum(key.startswith(f"more-{leaving}-") for key in crowd.done) > 10


def test_a_slot_that_another_takes_first_is_not_the_end(now):
    """A more urgent request is given the slot that was to be free; then its adapter leaves."""
    crowd = Crowd(1, now, policy="priority")
    crowd.ask("long", 1, n=30)
    crowd.steps(1)
    crowd.ask("other", 2, priority=5)
    crowd.steps(15)
    crowd.ask("urgent", 3, n=20)
    crowd.more, crowd.priority = (3,), {3: 5}
    crowd.steps(120)
    assert "urgent" in crowd.done and "other" in crowd.done


def test_who_may_not_be_held_back_is_not_waited_for(now):
    """The adapter with the fewest requests has more urgent ones: another leaves."""
    crowd = Crowd(2, now, policy="priority")
    crowd.more, crowd.priority = (1, 2), {1: 1, 2: 5}
    for key in ("a", "b", "c"):
        crowd.ask(key, 2, n=60, priority=5)
    crowd.steps(8)
    crowd.ask("other", 3, priority=5)
    crowd.steps(25)
    crowd.ask("first", 4, priority=1)
    crowd.steps(150)
    assert {"other", "first"} <= {*crowd.done}


def test_first_come_first_served_has_no_priorities(now):
    crowd = Crowd(1, now)
    crowd.more, crowd.priority = (1,), {1: -1}
    crowd.steps(8)
    crowd.ask("other", 2)
    crowd.steps(60)
    assert "other" in crowd.done


def test_a_scheduler_that_has_nothing_waiting_is_asked_nothing(now, monkeypatch):
    crowd = Crowd(1, now)
    crowd.ask("a", 1)
    crowd.steps(1)
    monkeypatch.setattr(turns.Turns, "_count", lambda self: pytest.fail("counted"))
    crowd.core.finish()
