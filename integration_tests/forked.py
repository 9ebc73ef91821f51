"""Engines' processes are forked from one that has imported vLLM: no start pays for imports again.

On a CPU vLLM spawns them, since a fork hangs where the parent's OpenMP threads had work. A fork
server (`multiprocessing`) does nothing but import. `vllm serve` starts as users' does.
"""

from __future__ import annotations

import functools
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess

_IMPORTED = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"]


class _Process(ForkServerProcess):
    """With its parent's environment of now, not with that of when the fork server started."""

    def start(self) -> None:
        self._environ = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environ)
        super().run()


class _Context(ForkServerContext):
    Process = _Process


@functools.cache
def _context() -> _Context:
    found = _Context()
    found.set_forkserver_preload(_IMPORTED)
    return found


def use() -> None:
    """Engines that this process starts from now on fork theirs."""
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    utils.get_mp_context = multiproc_executor.get_mp_context = _context
