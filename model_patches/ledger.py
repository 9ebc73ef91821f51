"""Which adapters the workers of one engine hold: the engine core's own book of them.

The core alone knows both sides: what the workers hold (they report it with every load) and which
adapters unfinished requests name. So it is the core that says what may be evicted, that has an
adapter loaded before a request for it is scheduled, and that knows an adapter's version, which is
its identity in the prefix cache. One thread uses a ledger; others may call `find` and `held`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm_lora_ext.conditions.recipe import is_recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.book import Book
from vllm_lora_ext.model_patches.held import (
    Adapter,
    Held,
    changed,
    from_memory,
    id_in_use,
    incomplete,
)
from vllm_lora_ext.model_patches.pins import Pins
from vllm_lora_ext.model_patches.residency import Prepared

LOAD, VERSIONS = "lora_ext_load", "lora_ext_versions"
"""Methods of the worker (`worker_rpc`)."""


class Ledger(Book):
    """The book, and what the workers are told to hold.

    Args:
        rpc: calls a method of every worker with these arguments and returns all answers.
        slots: adapters that one step can use.
        named: `at` of what unfinished requests use.
        running: those of them whose requests are being computed.
        replaced: called with `at` when somebody else has put other content there.
        lost: called with `at` and the reason when nothing stands there any more although unfinished
            requests use it.
    """

    def __init__(
        self,
        rpc: Callable[..., list[Any]],
        slots: int,
        named: Callable[[], set[int]],
        running: Callable[[], set[int]],
        replaced: Callable[[int], None],
        lost: Callable[[int, AdapterError], None],
    ) -> None:
        super().__init__(Pins(rpc, slots))
        self._rpc = rpc
        self._named, self._running = named, running
        self._replaced, self._lost = replaced, lost
        self._leaving: set[int] = set()  # dropped as soon as no request uses them
        self._theirs: set[int] = set()  # held by all workers, handed to them by somebody else
        self._unsure = self._touched = False
        self._gone: set[int] = set()  # adapters that were evicted, and no front end knows yet
        self.evicted = {"adapters_evicted": 0, "derived_adapters_evicted": 0}

    def ids(self) -> set[int]:
        """Adapters that are held, and were not removed."""
        self._refresh()
        ats = set(self._held) - self._leaving
        return {self._held[at].lora_id for at in ats if self._is_current(at)} | self._theirs

    def enter(self, adapter: Adapter, version: str | None) -> int:
        """Where a new request finds its adapter, which is loaded if need be.

        Args:
            version: the digest that the request was promised; None: none.
        Raises:
            AdapterError: as `add`; `adapter_changed`, that version cannot be had any more.
        """
        lora_id = adapter.lora_int_id
        at = self.find(lora_id, version) if version and not adapter.load_inplace else None
        derived = is_recipe(adapter.lora_path)
        if at is None and version and not derived and lora_id not in self._last:
            raise AdapterError(
                "not_found", "the adapter was unloaded while the request was on its way",
                seen=adapter.lora_name, fix="load it again",
            )  # fmt: skip
        if at is None or self._unsure:
            self._ensure(adapter)
            at = self.find(lora_id, version)
        if at is None:
            raise AdapterError(
                "adapter_changed", "the adapter was replaced while the request was on its way",
                seen=adapter.lora_name, fix="send the request again",
            )  # fmt: skip
        self._pins.check(at)
        return at

    def add(
        self,
        adapter: Adapter,
        source: Any = None,
        at: int | None = None,
        expected: str | None = None,
    ) -> list[int]:
        """Has an adapter loaded, if it is not held already or is to be replaced.

        Args:
            source: its tensors; None: they are in a folder.
            at: where workers have begun to read it (`place`); None: nowhere.
            expected: the version that it may replace; None: any.
        Returns:
            Ids of the adapters that were evicted for it, and since the last call for requests.
        Raises:
            AdapterError: it cannot be served, or `version_conflict`; whatever was held before still
                is. `files_changed`: it was evicted, and is nowhere any more.
        """
        self._ensure(adapter, source, at, expected)
        gone, self._gone = self._gone, set()
        return sorted(other for other in gone if self.current(other) is None)

    def _ensure(
        self,
        adapter: Adapter,
        source: Any = None,
        at: int | None = None,
        expected: str | None = None,
    ) -> None:
        """As `add`."""
        self._refresh()
        lora_id = adapter.lora_int_id
        self._make_way(adapter)
        self.check_expected(adapter, expected)
        current, held = self._versions.current(lora_id), self.current(lora_id)
        if current is not None and held is not None:
            if not self.reads(adapter, source):
                self._check_same(adapter, held)
                self._pins.check(current)
                self._leaving.discard(current)
                return
            replaceable = source is None and current not in self._leaving
            if held.name != adapter.lora_name and not replaceable:
                raise id_in_use(adapter, held)
        self._pins.check(lora_id if current is None else current)
        if source is None and from_memory(adapter.lora_path):
            raise AdapterError(
                "not_found", "this adapter was handed over as tensors and is no longer loaded",
                seen=adapter.lora_name, fix="hand it over again with add_adapter",
            )  # fmt: skip
        ahead = at is not None and at not in self._held
        place = at if at is not None and ahead else self.place(lora_id)
        away = None if source or place in self._theirs else self.away(adapter)
        self._load(adapter, Prepared() if source and ahead else source, place, away)

    def reads(self, adapter: Adapter, source: Any) -> bool:
        """Whether `add` would have the workers read an adapter."""
        current = self._versions.current(adapter.lora_int_id)
        held = current is not None and current not in self._leaving  # it was removed
        return source is not None or adapter.load_inplace or not held

    def roll_back(self, adapter: Adapter, version: str, expected: str | None) -> None:
        """New requests get an older version again, which from now on is not evicted.

        Args:
            version: its digest; expected: as in `add`.
        Raises:
            AdapterError: `not_found`, it is not held any more; `version_conflict`.
        """
        self._refresh()
        self.check_expected(adapter, expected)
        lora_id = adapter.lora_int_id
        at = self.find(lora_id, version)
        if at is None:
            held = [self._held[i].version for i in self._versions.all(lora_id) if i in self._held]
            raise AdapterError(
                "not_found", f"this version of {adapter.lora_name} is not held", seen=version,
                limit=", ".join(held) or "none is", fix="load it again from its files",
            )  # fmt: skip
        self._return_to(lora_id, at)

    def take_back(self, lora_id: int, version: str, before: str | None) -> None:
        """Undoes an `add` or `roll_back` that made new requests get `version`, which `last` said to
        be `before` until then; unless they get another one by now."""
        self._refresh()
        if version == before or self.last(lora_id) != version:
            return
        at = None if before is None else self.find(lora_id, before)
        if at is not None:
            self._return_to(lora_id, at)
            return
        away = self._away.get(lora_id)
        self.remove(lora_id)
        if before is not None:
            self._last[lora_id] = before
        if away is not None and away.version == before:
            self._away[lora_id] = away

    def remove(self, lora_id: int) -> bool:
        """Drops an adapter; versions that unfinished requests use, as soon as they are done."""
        ats, named = self._versions.all(lora_id), self._named()
        self._last.pop(lora_id, None)
        for at in ats:
            if at in named:
                self._leaving.add(at)
            else:
                self._drop(at)
        self._away.pop(lora_id, None)
        return bool(ats) or self._drop(lora_id)

    def tidy(self) -> None:
        """Drops what was removed and is not used any more. To be called before every step."""
        self._refresh()
        if self._leaving:
            for at in self._leaving - self._named():
                self._drop(at)
        self._pins.settle()

    def pin(self, lora_id: int) -> bool:
        """Keeps an adapter in its slot for good.

        Raises:
            AdapterError: `not_found`; `slots_pinned` when requests that the engine has taken on
                need the slot.
        """
        self._refresh()
        at, held = self._versions.current(lora_id), self.current(lora_id)
        if at is None or held is None:
            raise AdapterError(
                "not_found", "an adapter that is not loaded cannot be pinned", seen=lora_id,
                fix="load it first",
            )  # fmt: skip
        if not held.parts:
            raise incomplete(held.name, held.understands)
        return self._pins.pin(at, self._named(), self._running())

    def doubt(self) -> None:
        """Somebody called the workers behind the ledger's back: it asks them before it answers."""
        self._unsure = self._touched = True

    def _refresh(self) -> None:
        if not self._unsure:
            return
        touched, self._unsure, self._touched = self._touched, False, False
        ranks: list[dict[int, Any]] = self._rpc(VERSIONS)
        held_by_all = set(ranks[0]).intersection(*ranks[1:])
        for at in set(self._held) - held_by_all:
            self._leave(at, taken=touched)
            self._lose(at, AdapterError(
                "not_found", "the adapter was taken from the workers", seen=at, fix="load it again",
            ))  # fmt: skip
        for at, report in ranks[0].items():
            self._believe(at, report)
        self._theirs = held_by_all - set(self._held)

    def _believe(self, at: int, report: Any) -> None:
        """What a worker says it holds; under an adapter's own id it is the adapter's newest."""
        held = self._held.get(at)
        if held is not None and held.version == report.version:
            return
        known = held or self.current(at)
        if known is None:
            return  # not of the ledger's adapters
        self._held[at] = Held.of(known, [report], given=True)  # whoever wrote it has it, if anybody
        if held is not None:
            self._replaced(at)
        if at == known.lora_id or self._is_current(at):
            self._switch(known.lora_id, at)

    def _make_way(self, adapter: Adapter) -> None:
        """A derived adapter's id follows from what it is made of: another's may be the same."""
        lora_id, held = adapter.lora_int_id, self._held.get(adapter.lora_int_id)
        if held is None or held.path == adapter.lora_path:
            return
        derived = is_recipe(adapter.lora_path) and is_recipe(held.path)
        if derived and lora_id not in self._named() | self.pinned:
            self._drop(lora_id)

    def _load(self, adapter: Adapter, source: Any, at: int, away: Held | None) -> None:
        """Args: away: what it was when it was evicted, and must be again; None: anything."""
        there = copy.copy(adapter)
        there.lora_int_id = at
        answers = self._rpc(LOAD, there, source, frozenset(self._kept(adapter.lora_int_id) | {at}))
        errors = [a for a in answers if isinstance(a, str)]
        reports = [a for a in answers if not isinstance(a, str)]
        self._take_out(reports, at, bool(errors))
        if len({r.version for r in reports}) > 1:
            errors.append(str(AdapterError(
                "ranks_differ", "the workers read different files under the adapter's path",
                seen=adapter.lora_path, fix="give every machine the same files",
            )))  # fmt: skip
        if away is not None and not errors and reports[0].version != away.version:
            errors.append(str(changed(away, reports[0].version)))
        if errors:
            error = AdapterError.parse(errors[0])
            assert error is not None, errors[0]
            self._unsure = True  # what was evicted for it may not be among the answers
            if reports or at not in self._theirs:  # a load may fail when a worker holds it already
                self._drop(at)
            raise error
        theirs = at in self._theirs  # nobody else has its tensors
        self._theirs.discard(at)
        self._note(adapter, reports, at, given=source is not None or theirs)

    def _kept(self, lora_id: int) -> set[int]:
        """What stays in host memory while an adapter is loaded: its current version too, which goes
        on serving when the next one is refused."""
        given = {at for at, held in self._held.items() if held.given and self._is_current(at)}
        current = self._versions.current(lora_id)
        own = {current} if current is not None else set()
        return given | self._theirs | self._pins.kept | self._named() | own

    def _take_out(self, reports: list[Any], at: int, failed: bool) -> None:
        """Forgets what the workers have evicted."""
        for other in set().union(*(r.evicted for r in reports)) - {at}:
            self._leave(other, taken=False)
            if failed or any(other not in r.evicted for r in reports):
                self._rpc("remove_lora", other)  # every worker holds the same

    def _leave(self, at: int, taken: bool) -> None:
        """Forgets a version that nobody removed, and remembers what an adapter was.

        Args:
            taken: by somebody else, who may bring other content; else it was evicted.
        """
        held = self._held.get(at)
        if held is not None and self._is_current(at):
            if not is_recipe(held.path):
                self._away[held.lora_id] = held.without_weights(taken)
            if not taken:
                self._gone.add(held.lora_id)
                derived = "derived_" if is_recipe(held.path) else ""
                self.evicted[f"{derived}adapters_evicted"] += 1
        self._forget(at)

    def _note(self, adapter: Adapter, reports: list[Any], at: int, given: bool) -> None:
        lora_id, held = adapter.lora_int_id, Held.of(adapter, reports, given)
        same = self.find(lora_id, held.version)
        if same is not None and same != at:  # one copy of it is enough
            self._rpc("remove_lora", at)
            at = same
        self._held[at] = held
        self._switch(lora_id, at)

    def _return_to(self, lora_id: int, at: int) -> None:
        """To an older version: its folder may hold another one by now, so it must not leave."""
        if at != self._versions.current(lora_id):
            self._held[at].given = True
        self._switch(lora_id, at)

    def _switch(self, lora_id: int, at: int) -> None:
        """From now on new requests get the version held there."""
        held, old = self._held[at], self._versions.current(lora_id)
        self._leaving.update(self._versions.switch(lora_id, at))
        self._leaving.discard(at)
        if not is_recipe(held.path):
            self._last[lora_id] = held.version
        if old is not None and old != at and self._pins.keeps(old):
            self._pins.pass_on(old, at)
            self._leaving.add(old)  # its slot is not its own any more
        self.tidy()

    def _drop(self, at: int) -> bool:
        self._theirs.discard(at)
        self._forget(at)
        return all(self._rpc("remove_lora", at))

    def _lose(self, at: int, error: AdapterError) -> None:
        if at in self._named():
            self._lost(at, error)

    def _forget(self, at: int) -> None:
        held = self._held.pop(at, None)
        if held is not None:
            self._versions.forget(held.lora_id, at)
        self._leaving.discard(at)
        self._pins.forget(at)

    def _check_same(self, adapter: Adapter, held: Held) -> None:
        if (held.name, held.path) != (adapter.lora_name, adapter.lora_path):
            raise id_in_use(adapter, held)
