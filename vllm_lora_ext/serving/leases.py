"""Files that an engine may read at any time, whatever the store of merges throws out.

A lease is a folder of hard links: it costs no space while the store has the files too, and keeps
them when the store's own limit evicts them.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from itertools import count
from pathlib import Path

LOCK = "lock"


class Leases:
    """The folders of one process, below `root`; those of processes that died are cleared away."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.iterdir():
            _clear_if_dead(left)
        self._root = Path(tempfile.mkdtemp(prefix="server-", dir=root))
        self._lock = _locked(self._root / LOCK)
        self._numbers = count(1)
        atexit.register(self.close)

    def new(self) -> Path:
        """A folder of its own, not there yet."""
        return self._root / str(next(self._numbers))

    def close(self) -> None:
        """Every folder of this process goes."""
        atexit.unregister(self.close)
        shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._lock)


def link_folder(source: Path, target: Path) -> None:
    """`target` becomes a folder with the files of `source`; copies where links cannot be made.

    Raises:
        FileNotFoundError: a file of `source` went meanwhile.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copy2(file, target / file.name)


def _locked(path: Path) -> int:
    """Held until the process ends, however it ends."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _clear_if_dead(folder: Path) -> None:
    try:
        os.close(_locked(folder / LOCK))
    except OSError:
        return  # somebody lives there, or it is not ours to clear
    shutil.rmtree(folder, ignore_errors=True)
