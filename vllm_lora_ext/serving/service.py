"""From the name of a mix to an adapter that the engine holds; as long as requests need it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving.leases import Leases
from vllm_lora_ext.serving.mix_name import Mix
from vllm_lora_ext.serving.process import Builder
from vllm_lora_ext.serving.sources import Job, Sources
from vllm_lora_ext.settings import OLDER_VERSIONS, LoraExtSettings, MergeSettings

logger = logging.getLogger("vllm.lora_ext.serving")


class Host(Protocol):
    """What a server does for the mixes."""

    @property
    def max_rank(self) -> int:
        """Ranks that an adapter slot has."""

    @property
    def dtype(self) -> str:
        """Of the adapters in the slots: float32, bfloat16 or float16."""

    def adapters(self) -> Mapping[str, tuple[str, str]]:
        """Adapters that were registered, without mixes: name → (path, digest of the content)."""

    def folder(self, path: str) -> Path:
        """The folder behind an adapter's path; may block. Raises AdapterError."""

    async def load(self, name: str, path: Path) -> object:
        """Puts an adapter into the engine. Raises AdapterError, the engine refuses it.

        Args:
            name: for the engine; no two adapters that are in use at a time have it in common.
        """

    def show(self, model: str, loaded: object) -> None:
        """Requests for `model` get this adapter from now on."""

    async def forget(self, loaded: object) -> None:
        """No request for it will come, and none is in flight."""

    def hide(self, model: str) -> None:
        """Requests for `model` no longer find it."""


@dataclass(eq=False)
class Entry:
    """One adapter that was made here.

    Args:
        model: what requests call it.
        version: of everything that it was made of; once loaded by a name, of its content.
        path: its folder, this entry's own.
        holders: requests that use it.
        loaded: what the host gave for it.
        sent: what a client calls it by: the mix's name, or the path of its recipe as it was sent.
    """

    model: str
    version: object
    path: Path
    holders: set[int] = field(default_factory=set)
    loaded: object = None
    task: asyncio.Task[None] | None = None
    retired: bool = False
    sent: str = ""

    @property
    def idle(self) -> bool:
        return not self.holders and (self.task is None or self.task.done())

    def shown(self, text: str) -> str:
        """A text for clients, who know no folder of the server."""
        return text.replace(str(self.path), self.sent)


class Mixes:
    """The mixes of one server process. Everything but `Host.folder` runs on its event loop."""

    def __init__(self, settings: LoraExtSettings, host: Host) -> None:
        self._settings, self._host = settings.merge or MergeSettings(), host
        self._leases = _leases(self._settings.folder() / "served")
        self._sources = Sources(self._settings, settings.adapter_roots, host)
        self._builder = Builder(self._settings.max_seconds)
        self._live: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        # Adapters that were loaded from a recipe's file: now, and what may be rolled back to.
        self._recipes: dict[str, deque[Entry]] = {}
        self._retired: set[Entry] = set()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()

    def names(self) -> set[str]:
        """Mixes, so that they are not taken for registered adapters."""
        return set(self._live)

    def made(self) -> dict[str, str]:
        """By folder, what a client may know of where its adapter comes from."""
        recipes = itertools.chain(*self._recipes.values())
        every = itertools.chain(self._live.values(), recipes, self._retired)
        return {str(entry.path): entry.sent for entry in every}

    async def serve(self, mix: Mix, holder: object) -> str:
        """Has the mix loaded; it stays until `holder` is gone.

        Returns:
            The mix's name in canonical form, which is the model's name from now on.
        Raises:
            AdapterError: `not_found`, `mix_limit`, `merge_busy`, `rank_too_large`, those of
                merging and of loading. Nothing is left of a mix that fails.
        """
        model = str(mix)
        if len(mix.terms) > self._settings.max_terms:
            raise AdapterError(
                "mix_limit", "the mix has too many adapters", seen=len(mix.terms),
                limit=self._settings.max_terms, fix="merge some of them offline first",
            )  # fmt: skip
        while True:
            job = self._sources.job_of(mix)
            entry = self._live.get(model)
            if entry is not None and entry.version != job.version:
                self._retire(entry)
                entry = None
            if entry is None:
                self._make_room()
                entry = self._live[model] = Entry(
                    model, job.version, self._leases.new(), sent=model
                )
                entry.task = self._go(self._build(entry, job))
                entry.task.add_done_callback(partial(self._built, entry))
            self._hold(entry, holder)
            self._live.move_to_end(model)
            assert entry.task is not None
            await asyncio.shield(entry.task)
            if not entry.retired:
                return model

    async def build_recipe(self, path: str) -> Entry:
        """An adapter made of a recipe's file, not loaded yet; `loaded` or `discard` comes next.

        Raises:
            AdapterError: those of the recipe and of merging.
        """
        job = await asyncio.to_thread(self._sources.job_of_file, path, self._host.adapters())
        entry = Entry("", job.version, self._leases.new(), sent=path)
        try:
            await self._run(entry, job)
        except BaseException:
            self._discard(entry)
            raise
        return entry

    def loaded(self, model: str, entry: Entry, version: str) -> None:
        """`model` is this adapter from now on, made of a recipe; older ones stay for a rollback.

        Args:
            version: the digest of its content. The engine keeps one adapter of it, from the folder
                that it was loaded from last.
        """
        entry.model, entry.version = model, version
        entries = self._recipes.setdefault(model, deque())
        for same in [other for other in entries if other.version == version]:
            entries.remove(same)
            self._retire(same)
        entries.append(entry)
        if len(entries) > OLDER_VERSIONS + 1:
            self._retire(entries.popleft())

    def rolled_back(self, model: str, version: str) -> None:
        """`model` is an older version again, which the next loads push out last."""
        if model in self._recipes:
            of_version = sorted(self._recipes[model], key=lambda entry: entry.version == version)
            self._recipes[model] = deque(of_version)

    def discard(self, entry: Entry) -> None:
        """The engine did not take it."""
        self._discard(entry)

    def hold(self, model: str, holder: object) -> None:
        """Keeps the files of an adapter that came from a recipe while a request uses it."""
        for entry in self._recipes.get(model, ()):
            self._hold(entry, holder)

    def unloaded(self, model: str) -> None:
        """The user unloaded `model`."""
        for entry in self._recipes.pop(model, ()):
            self._retire(entry)
        if model in self._live:
            self._retire(self._live[model])

    async def _build(self, entry: Entry, job: Job) -> None:
        try:
            await self._run(entry, job)
            entry.loaded = await self._load(entry)
        except BaseException:
            if self._live.get(entry.model) is entry:
                del self._live[entry.model]
            entry.retired = True
            self._discard(entry)
            raise
        if not entry.retired:  # its adapters may have changed meanwhile
            self._host.show(entry.model, entry.loaded)

    async def _load(self, entry: Entry) -> object:
        try:
            return await self._host.load(self._unique(entry), entry.path)
        except AdapterError as error:
            raise AdapterError.parse(entry.shown(str(error))) or error from None

    async def _run(self, entry: Entry, job: Job) -> None:
        request = await asyncio.to_thread(job.request)
        await self._builder.run({
            **request, "lease": str(entry.path), "store": str(self._settings.folder() / "store"),
            "max_bytes": self._settings.max_disk_mb << 20, "dtype": self._host.dtype,
            "max_rank": min(self._settings.max_rank or self._host.max_rank, self._host.max_rank),
        })  # fmt: skip

    def _built(self, entry: Entry, task: asyncio.Task[None]) -> None:
        self._dispose_when_idle(entry)

    def _unique(self, entry: Entry) -> str:
        """vLLM takes two adapters of one name for one, even where their files differ."""
        same = any(other.model == entry.model for other in self._retired)
        return f"{entry.model}#{next(self._numbers)}" if same else entry.model

    def _make_room(self) -> None:
        if len(self._live) + len(self._retired) < self._settings.max_mixes:
            return
        oldest = next((entry for entry in self._live.values() if entry.idle), None)
        if oldest is None:
            raise AdapterError(
                "merge_busy", "every mix that the server may hold is in use",
                limit=self._settings.max_mixes, fix="try again, or raise merge.max_mixes",
            )  # fmt: skip
        self._retire(oldest)

    def _hold(self, entry: Entry, holder: object) -> None:
        key = next(self._numbers)  # and not id(holder), which the next request may have
        entry.holders.add(key)
        # The last reference may go in any thread.
        release = asyncio.get_running_loop().call_soon_threadsafe
        weakref.finalize(holder, _quietly, release, self._release, entry, key).atexit = False

    def _release(self, entry: Entry, key: int) -> None:
        entry.holders.discard(key)
        if entry.retired:
            self._dispose_when_idle(entry)

    def _retire(self, entry: Entry) -> None:
        """No new request gets it; its files go with its last request."""
        entry.retired = True
        if self._live.get(entry.model) is entry:
            del self._live[entry.model]
            self._host.hide(entry.model)
        self._retired.add(entry)
        self._dispose_when_idle(entry)

    def _dispose_when_idle(self, entry: Entry) -> None:
        if entry in self._retired and entry.idle:
            self._retired.discard(entry)
            self._go(self._dispose(entry))

    async def _dispose(self, entry: Entry) -> None:
        if entry.loaded is not None:
            await self._host.forget(entry.loaded)
        self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        self._retired.discard(entry)
        shutil.rmtree(entry.path, ignore_errors=True)

    def _go(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_seen)
        return task


def _seen(task: asyncio.Task[None]) -> None:
    """Waiters may all be gone: no log about an exception that nobody asked for."""
    if not task.cancelled():
        task.exception()


def _leases(folder: Path) -> Leases:
    try:
        return Leases(folder)
    except OSError as error:
        logger.error("The folder of merges cannot be written: %s", error)
        raise AdapterError(
            "merge_failed", "the merge cannot be written", seen=type(error).__name__,
            fix="the server's log says why",
        ) from error  # fmt: skip


def _quietly(call: Callable[..., Any], *args: Any) -> None:
    try:
        call(*args)
    except RuntimeError:  # the loop is closed
        return
