"""Whose turn it is for an adapter slot: no request waits for one for ever.

vLLM's scheduler takes each waiting request whose adapter is among those that run, and passes over
the others while these fill all slots: as long as requests for them keep coming, the others wait.
Here a request that was passed over for too long has one of those adapters take no more requests
until it runs itself. What runs is never stopped, and an adapter that has just got its slot keeps it
as long: else, with many waiting, each would compute one request and give the slot away again.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

_SINCE = "_lora_ext_passed_over"
"""Attribute of a waiting request: when it was first passed over for want of a slot."""

_WAITING = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Turns:
    """Of one engine core, whose scheduler asks for each waiting request that it comes to.

    Args:
        scheduler: its `running` are the requests that are being computed.
        slots: adapters that one step can use.
        patience: seconds for which a request may be passed over, and for which an adapter at least
            has its slot.
    """

    def __init__(self, scheduler: Any, slots: int, patience: float) -> None:
        self._scheduler, self._slots, self._patience = scheduler, slots, patience
        self._by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self._running: Counter[int] = Counter()  # requests by adapter
        self._urgency: dict[int, int] = {}  # of the most urgent of them
        self._got: dict[int, float] = {}  # when each of these adapters was first seen in its slot
        self._counted, self._now = 0, 0.0
        self._due: Any = None  # the request whose turn it is
        self._leaving = 0  # the adapter whose slot it gets

    def begin(self) -> None:
        """To be called before every step."""
        self._running.clear()
        self._urgency.clear()
        self._counted, self._now = 0, time.monotonic()
        if not self._scheduler.running:
            self._got.clear()
        if self._due is not None and self._due.status not in _WAITING:
            self._end()

    def admits(self, request: Any, pinned: frozenset[int]) -> bool:
        """Whether a waiting request with an adapter may join those that are being computed.

        Args:
            pinned: adapters that have their slots in every step, which the scheduler does not know.
        """
        self._count()
        at = request.lora_request.lora_int_id
        if self._leaving in pinned or (self._leaving not in self._running and self._full(pinned)):
            self._end()  # its slot is another's now
        if at == self._leaving:
            if not self._comes_first(request):
                return False
            self._end()  # more of it may come: some other adapter has to leave
        if at in self._running or at in pinned or not self._full(pinned):
            request.__dict__.pop(_SINCE, None)
            return True
        since = request.__dict__.setdefault(_SINCE, self._now)
        if self._now - since >= self._patience:
            self._begin(request, pinned)
        return False

    def _begin(self, request: Any, pinned: frozenset[int]) -> None:
        """Has an adapter leave for a request, unless one does for another that comes first."""
        urgency = self._urgency_of(request)
        if self._due is not None and urgency >= self._urgency_of(self._due):
            return
        had_theirs = [
            at for at in self._running.keys() - pinned
            if self._now - self._got[at] >= self._patience
        ]  # fmt: skip
        if had_theirs:  # those whose requests may all be held back are the first to leave
            self._due = request
            self._leaving = min(
                had_theirs, key=lambda at: (self._urgency[at] < urgency, self._running[at], at)
            )

    def _end(self) -> None:
        self._due, self._leaving = None, 0

    def _comes_first(self, request: Any) -> bool:
        """It is more urgent than the one whose turn it is, or holds KV blocks for which that one
        may have to wait."""
        urgent = self._urgency_of(request) < self._urgency_of(self._due)
        return urgent or bool(request.num_computed_tokens)

    def _urgency_of(self, request: Any) -> int:
        """What is smaller comes first; first come, first served, all are alike."""
        return int(request.priority) if self._by_priority else 0

    def _full(self, pinned: frozenset[int]) -> bool:
        return len(self._running.keys() | pinned) >= self._slots

    def _count(self) -> None:
        """What runs, as of now: within a step, the scheduler only adds to it."""
        running = self._scheduler.running
        if len(running) == self._counted:
            return
        for request in running[self._counted :]:
            if request.lora_request is not None:
                at, urgency = request.lora_request.lora_int_id, self._urgency_of(request)
                self._running[at] += 1
                self._urgency[at] = min(self._urgency.get(at, urgency), urgency)
        self._got = {at: self._got.get(at, self._now) for at in self._running}
        self._counted = len(running)
        if self._due is not None and self._due.lora_request.lora_int_id in self._running:
            self._end()
