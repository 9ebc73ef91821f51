"""The server's side of the merging process: one job at a time, off the event loop.

A process and not a thread: its tensors keep neither Python's lock nor the server's cores from the
requests, and one that takes too long can be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

from vllm_lora_ext.errors import AdapterError

PROGRAM = "vllm_lora_ext.serving.build"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


class Builder:
    """Runs jobs of `build.run` in a process of low priority, which starts with the first job."""

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job's answer.

        Raises:
            AdapterError: those of the job; `merge_timeout`; `merge_failed`, the process ended.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(self._max_seconds):
                    answer = await self._ask(job)
            except TimeoutError:
                await self.close()
                raise AdapterError(
                    "merge_timeout", "the merge takes too long", limit=f"{self._max_seconds:g} s",
                    fix="merge offline (vllm-lora-ext merge), or raise merge.max_seconds",
                ) from None  # fmt: skip
            except asyncio.CancelledError:
                await self.close()  # its answer would be taken for the next job's
                raise
        if "error" in answer:
            error = AdapterError.parse(answer["error"])
            raise error or AdapterError("merge_failed", answer["error"])
        return answer

    async def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        process = await self._alive()
        assert process.stdin and process.stdout
        line = b""
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            await self.close()
            raise AdapterError(
                "merge_failed", "the merging process ended", seen=process.returncode,
                fix="see the server's log; memory may have run out",
            )  # fmt: skip
        found: dict[str, Any] = json.loads(line)
        return found

    async def _alive(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", PROGRAM, stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE, env={**os.environ, **_ENVIRONMENT},
                )  # fmt: skip
            except OSError as error:  # no memory, no more processes or files
                raise AdapterError(
                    "merge_failed", "the merging process does not start", seen=error.strerror,
                    fix="try again when the server has room",
                ) from error  # fmt: skip
        return self._process

    async def close(self) -> None:
        """Ends the process; the next job starts another."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
