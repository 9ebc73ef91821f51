"""Engines' processes are forked from one that has imported vLLM: no start pays for imports again.

On a CPU vLLM spawns them, since a fork hangs where the parent's OpenMP threads had work. A fork
server (`multiprocessing`) does nothing but import. `vllm serve` starts as users' does.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess

import psutil

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


def _killed(kill: Callable[[int], None]) -> Callable[[int], None]:
    """The fork server reaps what ends; a child of this process would stay, a zombie to be found."""

    @functools.wraps(kill)
    def tolerant(pid: int) -> None:
        while True:  # until none ends between being found and being killed
            with contextlib.suppress(psutil.NoSuchProcess):
                return kill(pid)

    return tolerant


def use() -> None:
    """Engines that this process starts from now on fork theirs."""
    from vllm.v1 import utils as processes
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    utils.get_mp_context = multiproc_executor.get_mp_context = _context
    processes.kill_process_tree = _killed(processes.kill_process_tree)
