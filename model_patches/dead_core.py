"""Calls of an engine core that is dead end, in place of waiting for ever.

Targets: `AsyncMPClient._ensure_output_queue_task`, `SyncMPClient.__init__`, where a client begins
to listen to its core. Requests hear of the core's end through the queue of outputs; of calls
(`call_utility`: adapters, pauses, caches, ...) stock forgets those that wait for an answer. Whoever
waits in an HTTP handler then keeps the server itself from ending.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from vllm.v1.engine.core_client import AsyncMPClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError


def _end(waiting: MutableMapping[int, Any]) -> None:
    """Of the calls that nobody will answer any more."""
    while waiting:
        _, future = waiting.popitem()
        with suppress(Exception):  # its caller has gone, or it was answered in this moment
            future.set_exception(EngineDeadError())


def _end_after(listening: threading.Thread, waiting: MutableMapping[int, Any]) -> None:
    listening.join()
    _end(waiting)


def apply() -> None:
    """Wraps both clients of cores in processes of their own."""
    listen, init = AsyncMPClient._ensure_output_queue_task, SyncMPClient.__init__

    @functools.wraps(listen)
    def new_listen(self: Any) -> None:
        began = self.resources.output_queue_task is None
        listen(self)
        if began:
            task: asyncio.Task[None] = self.resources.output_queue_task
            waiting = self.utility_results  # and not self: the client must be free to go
            task.add_done_callback(lambda _: _end(waiting))

    @functools.wraps(init)
    def new_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        threading.Thread(
            target=_end_after, args=(self.output_queue_thread, self.utility_results), daemon=True,
            name="LoraExtDeadCore",
        ).start()  # fmt: skip

    AsyncMPClient._ensure_output_queue_task = new_listen
    SyncMPClient.__init__ = new_init
