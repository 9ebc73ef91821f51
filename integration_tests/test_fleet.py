"""`examples/ray_serve/`: two replicas, adapters on demand, and replicas that are killed under load.

Two engines at a time, for minutes: `make fleet`, not a part of CI.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from integration_tests.engines import recorded
from integration_tests.server import base_with_tokenizer, free_port, started

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif("VLLM_LORA_EXT_FLEET" not in os.environ, reason="only `make fleet`"),
]
EXAMPLE = Path(__file__).parent.parent / "examples/ray_serve/fleet.py"
KINDS = {"plain": recorded("plain-a"), "routed": recorded("loramoe-a")}
NAMES = [f"{kind}-{i}" for kind in KINDS for i in range(4)]
MIX = "cat:plain-0*0.25+plain-1*0.75"  # equal content: the same as either
CLIENTS, REQUESTS = 8, 160
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "RAY_enable_metrics_collection": "0",
}  # fmt: skip
FLAGS = (
    "--dtype", "float32", "--max-loras", "4", "--max-lora-rank", "64", "--block-size", "32",
    "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager",
)  # fmt: skip


class Fleet:
    """The running example, and what it should answer."""

    def __init__(self, url: str, base: Path) -> None:
        self.url, self._base = url, base
        self.by_name: dict[str, list[str]] = defaultdict(list)  # who answered, in order
        self.tries: list[int] = []

    def servers(self) -> list[psutil.Process]:
        """The `vllm serve` processes of the replicas that are there now."""
        return [
            process for process in psutil.process_iter(["cmdline"])
            if {"serve", str(self._base)} <= set(process.info["cmdline"] or ())
            and Path((process.info["cmdline"] or ["", ""])[1]).name == "vllm"
        ]  # fmt: skip

    async def ask(self, client: httpx.AsyncClient, name: str, turn: int) -> None:
        """One question; asserts the answer."""
        kind = KINDS["plain" if name == MIX else name.partition("-")[0]]
        turn %= len(kind.prompts)
        body = {
            "model": name, "prompt": kind.prompts[turn], "max_tokens": 12, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == kind.greedy[turn], name
        self.by_name[name].append(answer.headers["x-replica"])
        self.tries.append(int(answer.headers["x-tries"]))

    async def load(self, kill: Any) -> None:
        """Clients at work, and `kill` in the midst of it."""
        dice = random.Random(0)
        jobs = [(dice.choice([*NAMES, MIX]), dice.randrange(3)) for _ in range(REQUESTS)]

        async def work(client: httpx.AsyncClient) -> None:
            while jobs:
                await self.ask(client, *jobs.pop())
                if len(jobs) == REQUESTS - 40:
                    kill()

        async with httpx.AsyncClient(base_url=self.url, timeout=600, trust_env=False) as client:
            await asyncio.gather(*(work(client) for _ in range(CLIENTS)))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    place = tmp_path_factory.mktemp("fleet")
    base, port = base_with_tokenizer(place / "base"), free_port()
    for name in NAMES:
        shutil.copytree(KINDS[name.partition("-")[0]].folder, place / "adapters" / name)
    argv = [sys.executable, str(EXAMPLE), str(base), str(place / "adapters"), "--port", str(port),
            *FLAGS]  # fmt: skip
    url, log = f"http://127.0.0.1:{port}", place / "log"
    with started(argv, log, **ENVIRONMENT) as process:
        found, deadline = Fleet(url, base), time.monotonic() + 300
        while "is ready" not in log.read_text(errors="replace"):  # Ray Serve: all replicas are up
            tail = log.read_text(errors="replace")[-4000:]
            assert process.poll() is None and time.monotonic() < deadline, tail
            time.sleep(1)
        yield found
    deadline = time.monotonic() + 120
    while found.servers():  # they go with their replicas
        assert time.monotonic() < deadline, "a server is left"
        time.sleep(0.5)


def test_an_adapter_stays_with_the_replica_that_holds_it(fleet: Fleet) -> None:
    async def quietly() -> None:
        async with httpx.AsyncClient(base_url=fleet.url, timeout=600, trust_env=False) as client:
            for turn in range(4):
                for name in [*NAMES, MIX]:
                    await fleet.ask(client, name, turn)

    asyncio.run(quietly())
    homes = {name: set(replicas) for name, replicas in fleet.by_name.items()}
    assert all(len(replicas) == 1 for replicas in homes.values()), homes
    assert len(set().union(*homes.values())) == 2, "one replica holds everything"
    assert set(fleet.tries) == {1}


def test_what_is_not_there_is_not_found(fleet: Fleet) -> None:
    for name in ("plain-9", "../base", "cat:plain-0*"):
        body = {"model": name, "prompt": [1, 2], "max_tokens": 1}
        answer = httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code in (400, 403, 404), answer.text
    listed = httpx.get(f"{fleet.url}/v1/models", timeout=60, trust_env=False).json()["data"]
    assert [row["id"] for row in listed] == ["base", *sorted(NAMES)]


@pytest.mark.parametrize("victim", ["server", "replica"])
def test_a_replica_killed_under_load_costs_retries(fleet: Fleet, victim: str) -> None:
    """Never a wrong answer, never an error, and then there are two again."""
    fleet.tries.clear()
    before = {server.pid for server in fleet.servers()}
    assert len(before) == 2

    def kill() -> None:
        server = fleet.servers()[0]
        process = server if victim == "server" else server.parent().parent()
        process.kill()

    asyncio.run(fleet.load(kill))
    again = sum(tries > 1 for tries in fleet.tries)
    print(f"{victim} killed: {len(fleet.tries)} answers, all right, {again} asked again")
    assert len(fleet.tries) == REQUESTS and 0 < again < REQUESTS / 2
    deadline = time.monotonic() + 120
    while len({server.pid for server in fleet.servers()}) < 2:
        assert time.monotonic() < deadline, "the replica has not come again"
        time.sleep(1)
    assert len({server.pid for server in fleet.servers()} - before) == 1
