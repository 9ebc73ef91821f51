"""Reading adapters in a thread beside the engine's steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from vllm_lora_ext.model_patches.residency import Prepared


class _Job(NamedTuple):
    request: Any
    source: Any
    result: Future[Any]


class Loader:
    """Reads what was announced ahead of time, and the rest when it is asked for.

    Args:
        read: makes of a request (vLLM's `LoRARequest`) and a source what `take` returns.
    """

    def __init__(self, read: Callable[[Any, Any], Any]) -> None:
        self._read = read
        self._jobs: dict[int, _Job] = {}
        # One thread: a second would take the cores from the steps, not make one read faster.
        self._pool = ThreadPoolExecutor(1, "lora-ext-load")

    def begin(self, request: Any, source: Any) -> None:
        """Starts to read; what was begun under the same id before is forgotten."""
        result = self._pool.submit(self._read, request, source)
        self._jobs[request.lora_int_id] = _Job(request, source, result)

    def done(self, adapter_id: int) -> bool:
        """Whether `take` has nothing to wait for."""
        job = self._jobs.get(adapter_id)
        return job is None or job.result.done()

    def take(self, request: Any, source: Any) -> Any:
        """What `read` makes, or raises; read already if `begin` had the same arguments, or if the
        source is `Prepared`."""
        job = self._jobs.pop(request.lora_int_id, None)
        ahead = isinstance(source, Prepared)
        same = job is not None and job.request.lora_path == request.lora_path
        if job is not None and same and (ahead or job.source == source):
            return job.result.result()
        assert not ahead, "nothing was prepared"
        return self._read(request, source)

    def forget(self, adapter_id: int) -> None:
        """What was begun is not wanted any more."""
        self._jobs.pop(adapter_id, None)
