"""Reading adapters in a thread beside the engine's steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from vllm_lora_ext.model_patches.residency import Prepared


class Reading(NamedTuple):
    """What is to be done for one adapter, in any thread.

    Args:
        read: makes the adapter, or raises.
        uses: ids of adapters that it is made of, which must stay meanwhile.
    """

    read: Callable[[], Any]
    uses: frozenset[int] = frozenset()


class _Job(NamedTuple):
    request: Any
    source: Any
    uses: frozenset[int]
    result: Future[Any]


class Loader:
    """Reads what was announced ahead of time, and the rest when it is asked for.

    Args:
        plan: makes of a request (vLLM's `LoRARequest`) and a source what is to be done; called in
            the caller's thread.
    """

    def __init__(self, plan: Callable[[Any, Any], Reading]) -> None:
        self._plan = plan
        self._jobs: dict[int, _Job] = {}
        # One thread: a second would take the cores from the steps, not make one read faster.
        self._pool = ThreadPoolExecutor(1, "lora-ext-load")

    def begin(self, request: Any, source: Any) -> None:
        """Starts to read; what was begun under the same id before is forgotten."""
        reading = self._plan(request, source)
        result = self._pool.submit(reading.read)
        self._jobs[request.lora_int_id] = _Job(request, source, reading.uses, result)

    def done(self, adapter_id: int) -> bool:
        """Whether `take` has nothing to wait for."""
        job = self._jobs.get(adapter_id)
        return job is None or job.result.done()

    def uses(self) -> frozenset[int]:
        """Ids of adapters of which others are being made."""
        return frozenset().union(*(job.uses for job in self._jobs.values()))

    def take(self, request: Any, source: Any) -> Any:
        """What was read, or raises; ahead of time if `begin` had the same arguments, or if the
        source is `Prepared`."""
        job = self._jobs.pop(request.lora_int_id, None)
        ahead = isinstance(source, Prepared)
        same = job is not None and job.request.lora_path == request.lora_path
        if job is not None and same and (ahead or job.source == source):
            result = job.result
            try:
                del job
                return result.result()
            finally:
                del result  # an error's traceback holds this frame, and the result the error
        assert not ahead, "nothing was prepared"
        return self._plan(request, source).read()

    def forget(self, adapter_id: int) -> None:
        """What was begun is not wanted any more."""
        self._jobs.pop(adapter_id, None)
