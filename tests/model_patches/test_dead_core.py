"""Calls that wait for an engine core when it dies: vLLM's own clients with nothing behind them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import (
    AsyncMPClient,
    BackgroundResources,
    MPClient,
    SyncMPClient,
)
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_lora_ext import plugin
from vllm_lora_ext.model_patches.driving import run, run_async
from vllm_lora_ext.model_patches.request_steps import Load

plugin.register()
DEAD = EngineCoreProc.ENGINE_CORE_DEAD
SOON = 10


class Core:
    """A socket to a core that takes everything in, and says only what it is told to."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.says: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def send_multipart(self, message: Any, copy: bool) -> None:
        self.sent.append(message)

    async def recv_multipart(self, copy: bool) -> list[Any]:
        return await self.says.get()


def client_of(core: Core) -> Any:
    client = AsyncMPClient.__new__(AsyncMPClient)
    client.resources = BackgroundResources(ctx=None)
    client.resources.output_socket = core
    client.input_socket, client.core_engine, client.client_index = core, b"0", 0
    client.core_engines = [client.core_engine]
    client.encoder = SimpleNamespace(encode=lambda value: [b""])
    client.decoder, client.utility_results, client.outputs_queue = None, {}, asyncio.Queue()
    return client


def steps() -> Any:
    lora = SimpleNamespace(lora_int_id=1)
    yield Load(lora)  # type: ignore[arg-type]


async def _asking(end: Any) -> None:
    core = Core()
    client = client_of(core)
    ours = asyncio.create_task(run_async(SimpleNamespace(engine_core=client), steps()))
    stock = asyncio.create_task(client.call_utility_async("pause_scheduler"))
    while len(core.sent) < 2:
        assert not ours.done(), ours.exception()
        await asyncio.sleep(0)
    await end(client, core)
    for call in (ours, stock):
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(call, SOON)
    assert client.utility_results == {}
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(client.call_utility_async("add_lora"), SOON)
    assert isinstance(client.outputs_queue.get_nowait(), EngineDeadError)  # requests hear it too


def test_a_core_that_says_that_it_is_dead():
    async def end(client: Any, core: Core) -> None:
        await core.says.put([SimpleNamespace(buffer=DEAD)])

    asyncio.run(_asking(end))


def test_a_core_that_was_killed():
    """vLLM's monitor of the processes cancels the task that listens."""

    async def end(client: Any, core: Core) -> None:
        await asyncio.sleep(0.01)  # it listens
        client.resources.engine_dead = True
        client.resources.output_queue_task.cancel()

    asyncio.run(_asking(end))


def test_calls_whose_callers_have_gone():
    async def scene() -> None:
        core = Core()
        client = client_of(core)
        call = asyncio.create_task(client.call_utility_async("add_lora"))
        while not core.sent:
            await asyncio.sleep(0)
        call.cancel()
        await core.says.put([SimpleNamespace(buffer=DEAD)])
        await client.resources.output_queue_task
        await asyncio.sleep(0)
        assert client.utility_results == {}

    asyncio.run(scene())


@pytest.fixture
def sync_client(monkeypatch):
    """A client in a thread of its own, and what speaks for its core."""
    context = zmq.Context()
    speaker = context.socket(zmq.PUSH)
    speaker.bind("inproc://core")

    def init(self: Any, **_: Any) -> None:
        self.ctx, self.resources = context, BackgroundResources(ctx=context)
        self.resources.output_socket = context.socket(zmq.PULL)
        self.resources.output_socket.connect("inproc://core")
        self.input_socket = SimpleNamespace(send_multipart=lambda *a, **k: None)
        self.core_engine, self.utility_results, self.decoder = b"0", {}, None
        self.encoder = SimpleNamespace(encode=lambda value: [b""])
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    monkeypatch.setattr(MPClient, "__init__", init)
    yield SyncMPClient(None, None, False), speaker
    context.destroy(linger=0)  # an open socket would stop whoever collects the context


def asked_in_threads(client: Any) -> list[Future[Any]]:
    """Our steps, and a call of stock's own, both waiting."""
    asked: list[Future[Any]] = []
    for call in (
        lambda: run(SimpleNamespace(engine_core=client), steps()),
        lambda: client.call_utility("pin_lora", 1),
    ):
        done: Future[Any] = Future()
        threading.Thread(target=_into, args=(done, call), daemon=True).start()
        asked.append(done)
    deadline = time.monotonic() + SOON
    while len(client.utility_results) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return asked


def _into(done: Future[Any], call: Any) -> None:
    try:
        done.set_result(call())
    except BaseException as error:
        done.set_exception(error)


@pytest.mark.parametrize("how", ["says", "killed"])
def test_an_offline_engine(sync_client, how):
    client, speaker = sync_client
    asked = asked_in_threads(client)
    if how == "says":
        speaker.send(DEAD)
    else:  # vLLM's monitor of the processes ends the thread that listens
        client.resources.engine_dead = True
        stop = client.ctx.socket(zmq.PAIR)
        stop.connect(client.resources.shutdown_path)
        stop.send(b"")
    for done in asked:
        with pytest.raises(EngineDeadError):
            done.result(SOON)
    with pytest.raises(EngineDeadError):
        client.call_utility("pin_lora", 1)
