"""The C library's heap in a CPU engine's process."""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Has glibc keep what a step frees, up to 256 MiB, for the next step.

    By default it may return an activation's pages to the system and take them back, cleared, in
    every layer: tens of thousands of page faults in a long prefill, in one start of an engine and
    not in the next. Another allocator, preloaded, does not read these settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
