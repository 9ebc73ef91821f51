"""A real `vllm serve` in a process group of its own, which always ends with the test.

`command` is what users type. With `fork` it runs in a fork of a process that has imported vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from integration_tests import forked
from integration_tests.engines import ENVIRONMENT, base_path

READY_S, STOP_S = 300, 20
CHAT = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    # What `chat_template_kwargs` of a request may put behind its messages.
    "{% if add_generation_prompt and ending is defined %}{{ ending }}{% endif %}"
)


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes] | forked.Command


def words(ids: list[int]) -> str:
    """Text that the tiny tokenizer turns into `ids`."""
    return " ".join(f"t{i}" for i in ids)


def base_with_tokenizer(
    dst: Path, base: str = "base_llama", own: Mapping[int, str] | None = None
) -> Path:
    """A tiny base model with a tokenizer of one word per token: `t17` is token 17.

    Args:
        own: tokens whose word is a sign instead, also within other words.
    """
    shutil.copytree(base_path(base), dst)
    add_tokenizer(dst, json.loads((dst / "config.json").read_text())["vocab_size"], own)
    return dst


def add_tokenizer(folder: Path, size: int, own: Mapping[int, str] | None = None) -> None:
    """Of `size` words, one per token, beside a model that is there."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    own = own or {}
    vocabulary = {own.get(i, f"t{i}"): i for i in range(size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    signs = [Split(sign, "isolated") for sign in own.values()]
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), *signs])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def command(base: Path, port: int, lora_ext: dict[str, Any] | None, *flags: str) -> list[str]:
    """`vllm serve` on loopback, fp32, LoRA on with room for a few small adapters."""
    vllm = str(Path(sys.executable).parent / "vllm")
    config = json.dumps({} if lora_ext is None else {"lora_ext": lora_ext})
    return [
        vllm, "serve", str(base), "--served-model-name", "base", "--additional-config", config,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "64",
        "--block-size", "32", "--max-model-len", "256", "--max-num-seqs", "8", "--seed", "0",
        *flags,
    ]  # fmt: skip


@contextlib.contextmanager
def paused(server: Server) -> Iterator[Callable[[Collection[str], int], None]]:
    """An engine that keeps its requests and computes none of them, of a server in vLLM's dev mode.

    On few cores a tiny request is over before the server is heard again, so that of many sent at
    once no two need ever be computed together.

    Yields:
        What waits until the engine has so many requests for adapters of these names.
    """

    def say(route: str) -> None:
        url = f"{server.url}/{route}"
        httpx.post(url, json={}, timeout=60, trust_env=False).raise_for_status()

    def wait_for(names: Collection[str], count: int) -> None:
        deadline = time.monotonic() + 60
        while (found := in_flight(server, names)) != count:
            assert time.monotonic() < deadline, f"{found} requests for {names} in flight"

    say("pause?mode=keep")
    try:
        yield wait_for
    finally:
        say("resume")


def in_flight(server: Server, names: Collection[str]) -> int:
    """Requests for adapters of these names, as the server lists them."""
    answer = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    return sum(row["in_flight"] for row in answer.json()["data"] if row["name"] in names)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(
    argv: list[str], log: Path, fork: bool = False, **environ: str
) -> Iterator[subprocess.Popen[bytes] | forked.Command]:
    """The running command; its whole process group is gone afterwards."""
    environ = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "WARNING", **environ}
    process: subprocess.Popen[bytes] | forked.Command
    with log.open("wb") as out:
        if fork:
            os.environ.update(ENVIRONMENT)  # of the process that is forked
            process = forked.Command(argv, log, environ)
        else:
            process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environ
            )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def serving(argv: list[str], log: Path, fork: bool = False, **environ: str) -> Iterator[Server]:
    """A healthy server."""
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}"
    with started(argv, log, fork, **environ) as process:
        deadline = time.monotonic() + READY_S
        while not _healthy(url):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            assert process.poll() is None, f"vllm serve ended with {process.returncode}:\n{tail}"
            assert time.monotonic() < deadline, f"not healthy in {READY_S} s:\n{tail}"
            time.sleep(0.3)
        yield Server(url, log, process)


def ended(
    argv: list[str], log: Path, timeout: float = 400, fork: bool = False, **environ: str
) -> tuple[int, str, float]:
    """Exit status, log and seconds of a server that should not come up."""
    begin = time.monotonic()
    with started(argv, log, fork, **environ) as process:
        code = process.wait(timeout)
        return code, log.read_text(errors="replace"), time.monotonic() - begin


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
