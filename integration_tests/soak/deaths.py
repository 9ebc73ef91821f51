"""Processes that are killed: of the whole server, to be started again, and of a part of it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress

import httpx
import psutil

from integration_tests.server import Server
from integration_tests.soak import world
from integration_tests.soak.api import Answer, Api, Question
from integration_tests.soak.world import PROMPTS, SHORT, STATIC, World

ENDS_S = 60
Start = Callable[[], AbstractContextManager[Server]]


def kill_and_start(start: Start, told: World, rounds: int) -> list[str]:
    """Kills a server in the midst of merges and loads and starts it again on the same disk.

    Args:
        start: of a server that keeps its merges where the one before kept them.
    Returns:
        What was wrong in answers after the starts: a merge that was half written, for one.
    """
    rng, wrong = random.Random(rounds), list[str]()
    for turn in range(rounds + 1):
        with start() as server:
            with closing(Api(server.url)) as api:
                world.hold(told, api, STATIC)
                if turn:
                    wrong += _wrong(api, told, world.killed_mixes(turn - 1))
            if turn < rounds:
                _busy_until_killed(server, told, world.killed_mixes(turn), rng.uniform(0.05, 2.5))
    return wrong


def _wrong(api: Api, told: World, mixes: list[str]) -> list[str]:
    found = []
    for question in (Question(mix, PROMPTS[0]) for mix in mixes):
        answer, wanted = api.ask(question, SHORT), told.of(question)[:SHORT]
        assert answer is not None
        if answer.tokens[: len(wanted)] != wanted:
            found.append(f"{question.model} after a kill: {answer}")
    return found


def _busy_until_killed(server: Server, told: World, mixes: list[str], seconds: float) -> None:
    stop = threading.Event()

    def ask(mix: str) -> None:
        with closing(Api(server.url)) as api, suppress(httpx.HTTPError):
            api.ask(Question(mix, PROMPTS[0]), 1)

    def load(number: int) -> None:
        with closing(Api(server.url)) as api, suppress(httpx.HTTPError):
            while not stop.is_set():
                for folder in told.folders.values():
                    api.load(f"soak-killed-{number}", folder, load_inplace=True)

    with ThreadPoolExecutor(len(mixes) + 2) as pool:
        for mix in mixes:
            pool.submit(ask, mix)
        for number in range(2):
            pool.submit(load, number)
        time.sleep(seconds)
        os.killpg(server.process.pid, signal.SIGKILL)
        stop.set()


def kill_part(server: Server, told: World, title: str) -> list[str]:
    """Kills one of a server's processes while it owes answers: all end, and the server too.

    Args:
        title: how the process calls itself.
    Returns:
        What was wrong: an answer that was wrong, a request or a server that did not end.
    """
    victim = part(server, title)
    victim.suspend()  # so that a load is under way, and no faster than what follows
    with ThreadPoolExecutor(4) as pool:
        load = pool.submit(_last_words, server, lambda api: api.load(
            "soak-late", told.folders[world.PLAIN[0]]
        ))  # fmt: skip
        asked = [
            pool.submit(_last_words, server, lambda api: api.ask(Question("base", PROMPTS[0]), 40))
            for _ in range(2)
        ]
        time.sleep(2)
        _heard(psutil.Process(server.process.pid))
        victim.kill()
        began = time.monotonic()
        answers = [job.result(2 * ENDS_S) for job in (load, *asked)]
        took = time.monotonic() - began
    wrong = [f"{answer} after the death of {title}" for answer in answers if answer.ok]
    if (answers[0].status, answers[0].code) != (503, "engine_dead"):
        wrong.append(f"a load in flight at the death of {title}: {answers[0]}")
    if took > ENDS_S:
        wrong.append(f"requests ended {took:.0f} s after the death of {title}")
    with suppress(Exception):
        server.process.wait(ENDS_S)
    if server.process.poll() is None:
        wrong.append(f"the server lives on {ENDS_S} s after the death of {title}")
    return wrong


def _heard(process: psutil.Process) -> None:
    """Waits until a process rests, so that what was sent to it has come to it."""
    deadline = time.monotonic() + ENDS_S
    before = -1.0
    while (now := sum(process.cpu_times()[:2])) > before + 0.1 and time.monotonic() < deadline:
        before = now
        time.sleep(1)


def part(server: Server, title: str) -> psutil.Process:
    """The process of a server that calls itself so."""
    tree = psutil.Process(server.process.pid).children(recursive=True)
    return next(p for p in tree if title in " ".join(p.cmdline()))


def _last_words(server: Server, say: Callable[[Api], Answer | None]) -> Answer:
    with closing(Api(server.url)) as api:
        try:
            answer = say(api)
        except httpx.HTTPError as error:
            return Answer(599, text=repr(error))
    assert answer is not None
    return answer
