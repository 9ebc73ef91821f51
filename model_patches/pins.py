"""Which versions of adapters keep their slots for good, and which come after them.

A pinned adapter's next version is pinned in its place, but requests may still use the old one: the
next waits until the old one is dropped, and has no slot to itself until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_lora_ext.errors import AdapterError


class Pins:
    """Of one engine core; `at` is the id under which the workers hold a version.

    Args:
        rpc: calls a method of every worker with these arguments and returns all answers.
        slots: adapters that one step can use.
    """

    def __init__(self, rpc: Callable[..., list[Any]], slots: int) -> None:
        self._rpc, self._slots = rpc, slots
        self.now: frozenset[int] = frozenset()  # these have their slots in every step
        self._heirs: dict[int, int] = {}  # by a version, the pinned one whose slot it waits for

    @property
    def kept(self) -> frozenset[int]:
        """The versions that have their slots for good, or will have."""
        return self.now | self._heirs.keys()

    def keeps(self, at: int) -> bool:
        """Whether a version is one of `kept`."""
        return at in self.kept

    def pin(self, at: int, named: set[int], running: set[int]) -> bool:
        """Keeps a version that is held in its slot for good.

        Args:
            named: what unfinished requests use; running: those of them that are being computed.
        Raises:
            AdapterError: `slots_pinned`.
        """
        if self.keeps(at):
            return True
        pinned = self.now | {at}
        free = self._slots - len(pinned)
        if free < 0 or (free == 0 and named - pinned) or len(running - pinned) > free:
            raise self._error("the slot is needed by requests that are not finished")
        return self._pin(at)

    def check(self, at: int) -> None:
        """Raises AdapterError `slots_pinned` when a version can never have a slot."""
        if len(self.now) >= self._slots and not self.keeps(at):
            raise self._error("every adapter slot is pinned to another adapter")

    def pass_on(self, old: int, at: int) -> None:
        """The next version gets what the old one has, or waits for."""
        pinned = self._heirs.pop(old, old)
        if at != pinned:
            self._heirs[at] = pinned

    def settle(self) -> None:
        """Pins what has waited long enough."""
        for at, pinned in list(self._heirs.items()):
            if pinned not in self.now:
                del self._heirs[at]
                self._pin(at)

    def forget(self, at: int) -> None:
        """A version that is not held any more."""
        self.now -= {at}
        self._heirs.pop(at, None)

    def _pin(self, at: int) -> bool:
        done = all(self._rpc("pin_lora", at))
        if done:
            self.now |= {at}
        return done

    def _error(self, message: str) -> AdapterError:
        return AdapterError(
            "slots_pinned", message, seen=f"{len(self.now)} pinned", limit=self._slots,
            fix="start with a larger --max-loras, or remove a pinned adapter",
        )  # fmt: skip
