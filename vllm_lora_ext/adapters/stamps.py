"""Whether somebody wrote to files while they were read: what was read is then nobody's adapter.

Old tensors beside new ones, or a config beside the weights of another version, may pass all checks.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from vllm_lora_ext.errors import AdapterError

# Linux notes the time of a write with the resolution of its clock's tick: 4 ms, on some 10.
_TICK_NS = 11_000_000
_TICKS = 3  # waited for at most: who writes that often is seen to have written

_Stamp = tuple[int, ...] | None


class Stamps:
    """Of every file, what the system said of it before it was opened."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, _Stamp]] = {}
        self._asked: dict[Path, Path] = {}

    def note(self, path: Path, name: str, asked: Path) -> None:
        """To be called before a file is opened. A second write in one tick would not show, so one
        that was written in this moment is waited for.

        Args:
            path: where it is; asked: the same through links, which may lead to another file later.
        """
        self._asked.setdefault(asked, path)
        if path not in self._seen:
            stamp = _stamp(path)
            for _ in range(_TICKS):
                if stamp is None or not 0 <= time.time_ns() - stamp[-1] < _TICK_NS:
                    break
                time.sleep(_TICK_NS / 1e9)
                stamp = _stamp(path)
            self._seen[path] = name, stamp

    def check(self) -> None:
        """Raises AdapterError `files_changed`."""
        moved = {path for asked, path in self._asked.items() if _real(asked) != path}
        for path, (name, stamp) in self._seen.items():
            if path in moved or _stamp(path) != stamp:
                raise AdapterError(
                    "files_changed", f"'{name}' was written to or removed while it was read",
                    fix="load it again once its files are complete; a new version belongs into a"
                    " folder of its own",
                )  # fmt: skip


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _stamp(path: Path) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
