"""Engines and servers are forked from one process that has imported vLLM: no start imports again.

On a CPU vLLM spawns its engines, since a fork hangs where the parent's OpenMP threads had work. A
fork server (`multiprocessing`) does nothing but import, and no plugin is loaded in it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, process, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import setproctitle
import torch

_IMPORTED = [
    "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama",
    "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve",
]  # fmt: skip
_spawn = util.spawnv_passfds
_server: Any = forkserver._forkserver  # type: ignore[attr-defined]


class _Process(ForkServerProcess):
    """With its parent's environment of now, not with that of when the fork server started."""

    environ: dict[str, str] | None = None

    def start(self) -> None:
        self.environ = self.environ or dict(os.environ)
        super().start()

    def run(self) -> None:
        setproctitle.getproctitle()  # finds the arguments' memory beside the first environment's
        os.environ.clear()
        os.environ.update(self.environ or {})
        if not self.daemon:  # what it starts in turn
            _fork_server_of_its_own()
            use()
        if threads := os.environ.get("OMP_NUM_THREADS"):  # was read when torch was imported
            torch.set_num_threads(int(threads))
        super().run()


class _Command(_Process):
    """In a session of its own."""

    def __init__(self, argv: list[str], outputs: list[Path], environ: Mapping[str, str]) -> None:
        super().__init__(target=_main, args=(argv,))
        self.outputs, self.environ = outputs, dict(environ)

    def run(self) -> None:
        os.setsid()
        for number, path in enumerate(self.outputs, start=1):
            with path.open("ab") as out:
                os.dup2(out.fileno(), number)
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


class Command:
    """A forked Python script or `python -m module`, with what tests need of `subprocess.Popen`."""

    def __init__(
        self, argv: list[str], log: Path, environ: Mapping[str, str], errors: Path | None = None
    ) -> None:
        _context()
        self._process = _Command(argv, [log, errors or log], environ)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        return code


def run(
    argv: list[str], folder: Path, environ: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, with the outputs in files of a folder; nothing of it stays."""
    out, errors = folder / "stdout.txt", folder / "stderr.txt"
    command = Command(argv, out, environ, errors)
    try:
        code = command.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(argv, code, out.read_text(), errors.read_text())


def _main(argv: list[str]) -> None:
    multiprocessing.current_process().name = "MainProcess"
    process._parent_process = None  # type: ignore[attr-defined]
    try:
        if argv[1] == "-m":
            sys.argv = argv[2:]
            runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _fork_server_of_its_own() -> None:
    """What it starts is its descendant, as users' is, and has its session and its log."""
    util.spawnv_passfds = _fork
    try:
        _server.ensure_running()
    finally:
        util.spawnv_passfds = _spawn


def _fork(exe: str, args: list[str], passed: list[int]) -> int:
    """In place of a new interpreter that would have to import: a fork, with these files only."""
    pid = os.fork()
    if pid == 0:
        util.spawnv_passfds = _spawn
        _server.__init__()  # the parent's holds its lock
        with contextlib.suppress(BaseException):
            kept = [2, *sorted(passed), os.sysconf("SC_OPEN_MAX")]
            for last, following in itertools.pairwise(kept):
                os.closerange(last + 1, following)
            forkserver.main(*passed, None)
        os._exit(0)
    return pid
