"""A command with a time limit, ended together with everything it started.

An engine that outlives its limit would keep the GPU's memory from the next one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

OK, TIME_LIMIT, INCOMPLETE = "ok", "time limit", "incomplete"
UNFINISHED = 75  # exit code of what is right so far and has more to do: the next call goes on


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, None where it had to be ended."""

    code: int | None
    seconds: float

    @property
    def state(self) -> str:
        if self.code is None:
            return TIME_LIMIT
        if self.code == UNFINISHED:
            return INCOMPLETE
        return OK if self.code == 0 else f"failed ({self.code})"


def run(
    command: Sequence[str | Path],
    seconds: float,
    env: Mapping[str, str] | None = None,
    log: IO[bytes] | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Runs `command` for at most `seconds`.

    Args:
        env: variables beside those of this process.
        log: gets what the command prints, which is printed here as well.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what follows is done
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command], env={**os.environ, **(env or {})}, cwd=cwd,
        stdout=subprocess.PIPE if log else None, stderr=subprocess.STDOUT if log else None,
        start_new_session=True,
    )  # fmt: skip
    try:
        if log is not None:
            _copy(process, log, start + seconds)
        code: int | None = process.wait(max(0.0, start + seconds - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return Ended(code, time.monotonic() - start)


def _copy(process: subprocess.Popen[bytes], log: IO[bytes], end: float) -> None:
    """What the command prints, as it comes, until it has ended or has no time left. What it
    started may print on after it: nobody waits for that."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    ended = False
    while not ended and time.monotonic() < end:
        ended = process.poll() is not None  # then what lies in the pipe is all
        while text := process.stdout.read():
            log.write(text)
            log.flush()
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
        if not ended:
            time.sleep(0.05)
