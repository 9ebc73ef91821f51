"""What installed packages add to a table of this project, by entry points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Protocol, TypeVar

from vllm_lora_ext.errors import AdapterError


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def with_packages(
    rows: Sequence[Row], kind: type[Row], group: str, bad: Callable[[str, str], AdapterError]
) -> tuple[Row, ...]:
    """The table's rows, then those of installed packages, in the order of their entry points'
    names.

    Args:
        kind: of a row.
        group: of the entry points, each of which names one row.
        bad: the error for an entry point, or a name, and why it cannot be used.
    Raises:
        AdapterError: `bad`'s; an entry point cannot be loaded, is no `kind`, or bears a name that
            is taken.
    """
    found = list(rows)
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            row = entry.load()
        except Exception as error:  # whatever a foreign package raises while it is imported
            raise bad(entry.value, f"it cannot be loaded ({error})") from error
        if not isinstance(row, kind):
            raise bad(entry.value, f"it is a {type(row).__name__}, not a {kind.__name__}")
        if row.name in {other.name for other in found}:
            raise bad(row.name, f"two {kind.__name__.lower()}s have this name")
        found.append(row)
    return tuple(found)
