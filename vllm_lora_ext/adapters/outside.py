"""What installed packages add to a table of this project, by entry points."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol, TypeVar

from vllm_lora_ext.errors import AdapterError


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def with_packages(rows: Sequence[Row], kind: type[Row], group: str, code: str) -> tuple[Row, ...]:
    """The table's rows, then those of installed packages, in the order of their entry points'
    names.

    Args:
        kind: of a row.
        group: of the entry points, each of which names one row.
        code: of the error.
    Raises:
        AdapterError: `code`, an entry point cannot be loaded, is no `kind`, or bears a name that
            is taken.
    """
    found = list(rows)
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            row = entry.load()
        except Exception as error:  # whatever a foreign package raises while it is imported
            why = f"it cannot be loaded ({error})"
            raise _bad(kind, group, code, entry.value, why) from error
        if not isinstance(row, kind):
            why = f"it is a {type(row).__name__}, not a {kind.__name__}"
            raise _bad(kind, group, code, entry.value, why)
        if row.name in {other.name for other in found}:
            why = f"two {kind.__name__.lower()}s have this name"
            raise _bad(kind, group, code, row.name, why)
        found.append(row)
    return tuple(found)


def _bad(kind: type, group: str, code: str, what: str, why: str) -> AdapterError:
    name = kind.__name__
    return AdapterError(
        code, f"an installed package brings a {name.lower()} that cannot be used: {why}",
        seen=what, limit=f"a {name} under the entry point group {group}",
        fix="mend or uninstall that package",
    )  # fmt: skip
