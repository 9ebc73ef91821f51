"""The order of unit tests under several processes."""

from __future__ import annotations

import pytest

# Files that take longest begin first, so that no process waits at the end.
_FIRST = (
    "test_triton.py", "test_identity.py", "test_docs.py", "test_kernels_table.py",
    "test_register.py", "test_cpu.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False  # not by the number of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*_FIRST, item.path.name).index(item.path.name))
