"""What goes along with every merge: its progress, whether it is still wanted, its base model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors
from vllm_lora_ext.merging.merge import Progress

Cancel = Callable[[], bool]


@dataclass(frozen=True)
class Watch:
    """The caller's wishes; both may be missing."""

    progress: Progress | None = None
    cancel: Cancel | None = None

    def ask(self) -> None:
        """Raises AdapterError `cancelled`."""
        if self.cancel and self.cancel():
            raise AdapterError("cancelled", "the merge was called off", fix="ask for it again")

    def module(self, done: int, every: int, name: str) -> None:
        """`Progress`, and an `ask`."""
        if self.progress:
            self.progress(done, every, name)
        self.ask()

    def check_base(self, wanted: str | None, factors: Factors, name: str) -> None:
        """A local copy, of the same last path part, counts as the same base model.

        Raises:
            AdapterError: `setting_mismatch`.
        """
        if not wanted or not factors.base_model:
            return
        if _tail(wanted) != _tail(factors.base_model):
            raise AdapterError(
                "setting_mismatch", f"the adapter {name} is of another base model than the recipe",
                seen=factors.base_model, limit=wanted,
                fix="mend base_model, or use another adapter",
            )  # fmt: skip


def _tail(name: str) -> str:
    return os.path.basename(os.path.normpath(name))
