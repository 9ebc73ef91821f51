"""What a client of a soak does, one thing at a time, and how it judges what it gets."""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from integration_tests.soak import world as known
from integration_tests.soak.api import Answer, Api, Question
from integration_tests.soak.world import (
    LIVE,
    LONG,
    MIXES,
    PROMPTS,
    SAYS,
    SHORT,
    STATIC,
    TWINS,
    World,
)

_SHOWN = 20


@dataclass
class Tally:
    """What all clients have seen."""

    acts: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)  # by status, or what else became of it
    refusals: Counter[str] = field(default_factory=Counter)  # by code
    faults: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def saw(self, answer: Answer | None) -> None:
        with self.lock:
            self.requests["hung up" if answer is None else str(answer.status)] += 1
            if answer is not None and answer.code:
                self.refusals[answer.code] += 1
            if answer is not None and answer.status >= 500:
                self._fault("5xx answers", f"{answer}")

    def fault(self, kind: str, detail: str) -> None:
        with self.lock:
            self._fault(kind, detail)

    def _fault(self, kind: str, detail: str) -> None:
        self.faults[kind] += 1
        if len(self.details) < _SHOWN:
            self.details.append(f"{kind}: {detail}")


class Client:
    """One thread's worth of traffic.

    Args:
        number: no two clients have the same; its adapters are named after it.
    """

    def __init__(self, number: int, url: str, world: World, tally: Tally) -> None:
        self._api, self._world, self._tally = Api(url), world, tally
        self._rng, self._name = random.Random(number), f"soak-own-{number}"
        self._acts: dict[str, tuple[int, Callable[[], None]]] = {
            "answer": (30, self._answer), "stream": (10, self._stream),
            "hang up": (12, self._hang_up), "long answer": (12, self._long),
            "mix by name": (10, self._mix), "several adapters, spans": (12, self._says),
            "load, ask, unload": (10, self._come_and_go),
            "replace or roll back": (10, self._replace),
            "bad folder": (5, self._refused), "files change": (4, self._change),
        }  # fmt: skip

    def run(self, stop: threading.Event) -> None:
        """Acts at random until told to stop."""
        names, weights = [*self._acts], [weight for weight, _ in self._acts.values()]
        with closing(self._api):
            while not stop.is_set():
                name = self._rng.choices(names, weights)[0]
                self._tally.acts[name] += 1
                try:
                    self._acts[name][1]()
                except Exception as error:  # a connection that broke, an answer that is none
                    self._tally.fault("broken answers", f"{name}: {error!r}")

    def _prompt(self) -> tuple[int, ...]:
        return self._rng.choice(PROMPTS)

    def _own(self, name: str, content: str, n: int = SHORT) -> None:
        """Asks a name that stands for one content."""
        prompt = self._prompt()
        answer = self._ask(Question(name, prompt), n)
        self._judge(answer, self._world.of_content(content, prompt), n, f"{name} as {content}")

    def _ask(self, question: Question, n: int) -> Answer:
        answer = self._api.ask(question, n)
        assert answer is not None
        self._tally.saw(answer)
        return answer

    def _judge(self, answer: Answer, wanted: tuple[int, ...], n: int, what: str) -> None:
        if not answer.ok:
            if answer.status < 500:
                self._tally.fault("refused without a reason", f"{what}: {answer}")
        elif len(answer.tokens) != n or answer.tokens[: len(wanted)] != wanted[:n]:
            self._tally.fault("wrong answers", f"{what}: {answer.tokens} in place of {wanted[:n]}")

    def _answer(self) -> None:
        if self._rng.random() < 0.25:
            question = Question("base", self._prompt())
            self._judge(self._ask(question, SHORT), self._world.of(question), SHORT, "base")
        else:
            number = self._rng.randrange(len(STATIC))
            self._own(STATIC[number], known.PLAIN[number])

    def _stream(self) -> None:
        self._live(streamed=True)

    def _long(self) -> None:
        number = self._rng.randrange(len(STATIC))
        self._own(STATIC[number], known.PLAIN[number], LONG)

    def _hang_up(self) -> None:
        question = Question(self._rng.choice((*STATIC, *LIVE, "base")), self._prompt())
        if self._rng.random() < 0.5:
            self._tally.saw(self._api.ask(question, LONG, patience=self._rng.uniform(0.01, 0.2)))
            return
        stream, left = self._api.stream(question, LONG), self._rng.randrange(1, 20)
        with closing(stream):
            for answer in stream:
                left -= 1
                if not answer.ok or not left:
                    break
        self._tally.saw(None if answer.ok else answer)

    def _mix(self) -> None:
        question = Question(self._rng.choice(MIXES), self._rng.choice(PROMPTS[:2]))
        answer = self._ask(question, SHORT)
        self._judge(answer, self._world.of(question), SHORT, question.model)

    def _says(self) -> None:
        question = Question("base", self._rng.choice(PROMPTS[1:]), self._rng.choice(SAYS))
        answer = self._ask(question, SHORT)
        self._judge(answer, self._world.of(question), SHORT, str(question.says))

    def _live(self, streamed: bool) -> Answer:
        """An answer of a name that others replace meanwhile: all of the version that it names."""
        question, n = Question(self._rng.choice(LIVE), self._prompt()), SHORT
        for _ in range(4):
            if streamed:
                *_, answer = self._api.stream(question, n)
                self._tally.saw(answer)
            else:
                answer = self._ask(question, n)
            if answer.code != "adapter_changed":  # it says: send the request again
                break
        content = self._world.versions.get(answer.version)
        if answer.ok and content is None:
            self._tally.fault("wrong answers", f"{question.model}: of version {answer.version}")
        else:
            wanted = self._world.of_content(content, question.prompt) if content else ()
            self._judge(answer, wanted, n, f"{question.model} as {content}")
        return answer

    def _come_and_go(self) -> None:
        content = self._rng.choice(self._world.contents)
        if not self._loaded(self._name, content):
            return
        self._own(self._name, content)
        if self._rng.random() < 0.5:
            self._unload_under_way(content)
        else:
            self._own(self._name, content)
            self._tally.saw(self._api.unload(self._name))
        gone = self._ask(Question(self._name, PROMPTS[0]), 1)
        if gone.status != 404:
            self._tally.fault("wrong answers", f"{self._name} was unloaded: {gone}")

    def _loaded(self, name: str, content: str) -> bool:
        loaded = self._api.load(name, self._world.folders[content])
        self._tally.saw(loaded)
        if not loaded.ok:
            self._tally.fault("refused without a reason", f"{name} as {content}: {loaded}")
        elif loaded.version != self._world.version(content):
            self._tally.fault("wrong answers", f"{content} is loaded as {loaded.version}")
        return loaded.ok

    def _unload_under_way(self, content: str) -> None:
        """A stream that has begun ends well, whatever happens to the name meanwhile."""
        prompt = self._prompt()
        stream = self._api.stream(Question(self._name, prompt), LONG)
        answer = next(stream)
        self._tally.saw(self._api.unload(self._name))
        for answer in stream:  # noqa: B007 the last of them
            pass
        self._tally.saw(answer)
        self._judge(answer, self._world.of_content(content, prompt), LONG, f"{content}, unloaded")

    def _replace(self) -> None:
        name = self._rng.choice(LIVE)
        row = self._api.adapters().get(name)
        if row is None:
            self._tally.fault("refused without a reason", f"{name} is not listed")
            return
        older = [old["version"] for old in row["older"]]
        if older and self._rng.random() < 0.4:
            body = {"version": self._rng.choice(older), "expected_version": row["version"]}
            answer = self._api.post("lora_ext/rollback", lora_name=name, **body)
            allowed = ("version_conflict", "not_found")  # older ones make way for newer
        else:
            folder = self._world.folders[self._rng.choice(self._world.contents)]
            answer = self._api.load(name, folder, expected_version=row["version"])
            allowed = ("version_conflict",)
        self._tally.saw(answer)
        if not answer.ok and answer.code not in allowed and answer.status < 500:
            self._tally.fault("refused without a reason", f"{name}: {answer}")
        self._live(streamed=False)

    def _refused(self) -> None:
        bad = self._rng.choice(self._world.bad)
        answer = self._api.load(f"{self._name}-bad", bad.folder)
        self._tally.saw(answer)
        if answer.code != bad.code:
            self._tally.fault("wrong refusals", f"{bad.folder.name}: {answer}")

    def _change(self) -> None:
        """Files are written anew, in place, or go, while the server reads them."""
        name, here = f"{self._name}-changing", self._world.root / "changing" / self._name
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self._world.folders[TWINS[0]], here)
        writing = threading.Thread(target=self._write, args=(here, self._rng.random() < 0.3))
        writing.start()
        answer = self._api.load(name, here)
        self._tally.saw(answer)
        writing.join()
        if answer.ok:
            content = self._world.versions.get(answer.version, "")
            if content in TWINS:
                self._own(name, content)
            else:
                self._tally.fault("wrong answers", f"half-written files as {answer.version}")
            self._tally.saw(self._api.unload(name))

    def _write(self, here: Path, vanish: bool) -> None:
        if vanish:
            shutil.rmtree(here, ignore_errors=True)
            return
        (weights,) = here.glob("*.safetensors")
        for _ in range(6):
            for content in reversed(TWINS):
                with suppress(OSError):
                    shutil.copyfile(self._world.folders[content] / weights.name, weights)
