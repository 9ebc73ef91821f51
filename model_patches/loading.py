"""Adapters that the workers read while the engine goes on with its steps.

The core has every worker begin to read and check, asks now and then whether they are done, and has
the adapter loaded when they are, which then takes copies only.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

PREPARE, PREPARED, FORGET = "lora_ext_prepare", "lora_ext_prepared", "lora_ext_forget"
"""Methods of the worker (`worker_rpc`)."""

_EVERY = 0.02  # seconds between questions to the workers: each waits for the step they are in
_IDLE = 0.005


@dataclass
class _Load:
    request: Any
    source: Any
    expected: str | None
    at: int = 0  # where the workers read it
    done: Future[Any] = field(default_factory=Future)
    begun: bool = False


class Loading:
    """The loads of one engine core that are under way; of one id, one after the other.

    Args:
        rpc: calls a method of every worker with these arguments and returns all answers.
        add: takes a request and its source, where the workers have read it, and the version that it
            may replace; returns what the future of `begin` is to hold.
        place: where the next version of an adapter can be read.
    """

    def __init__(
        self,
        rpc: Callable[..., list[Any]],
        add: Callable[[Any, Any, int, str | None], dict[str, Any]],
        place: Callable[[int], int],
    ) -> None:
        self._rpc, self._add, self._place = rpc, add, place
        self._loads: list[_Load] = []
        self._next = 0.0

    @property
    def pending(self) -> bool:
        """Whether `poll` has to be called again."""
        return bool(self._loads)

    def begin(self, request: Any, source: Any, expected: str | None) -> Future[Any]:
        """Begins a load; `poll` ends it."""
        load = _Load(request, source, expected)
        self._loads.append(load)
        self._start()
        return load.done

    def poll(self, idle: bool) -> None:
        """Ends the loads that the workers are done with; to be called at every step while any is
        `pending`.

        Args:
            idle: the engine has nothing else to do, and this may take its time.
        """
        if idle:
            time.sleep(_IDLE)
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        for load in [load for load in self._loads if load.begun]:
            if all(self._rpc(PREPARED, load.at)):
                self._loads.remove(load)
                answer = self._add(load.request, load.source, load.at, load.expected)
                self._rpc(FORGET, load.at)  # what was refused, or is there by now
                load.done.set_result(answer)
        self._start()

    def _start(self) -> None:
        busy = {load.request.lora_int_id for load in self._loads if load.begun}
        for load in self._loads:
            if load.request.lora_int_id not in busy:
                busy.add(load.request.lora_int_id)
                load.begun, load.at = True, self._place(load.request.lora_int_id)
                there = copy.copy(load.request)
                there.lora_int_id = load.at
                self._rpc(PREPARE, there, load.source)
