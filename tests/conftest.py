"""What all unit tests have: their order under several processes, the same random numbers in every
run, no proxy before their own servers; packages that bring rows of a table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("hypothesis"):  # a bare GPU machine has pytest alone
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "tests", deadline=None, print_blob=True,
        derandomize="LORA_EXT_FUZZ" not in os.environ,  # `make fuzz` without atheris
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    settings.load_profile("tests")

# Both names: urllib heeds the small one alone where both are set.
_DIRECT = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
_DIRECT = ",".join(filter(None, (_DIRECT, "127.0.0.1,localhost")))
os.environ.update(NO_PROXY=_DIRECT, no_proxy=_DIRECT)

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own; torch is not loaded for those that need none."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretends that a package with one module and one entry point, `group: NAME`, is installed."""
    from vllm_lora_ext.adapters import registry
    from vllm_lora_ext.merging import methods
    from vllm_lora_ext.serving import operations

    tables = (registry.formats, methods.all_methods, operations.operations)

    def install(module: str, source: str, group: str = registry.ENTRY_POINTS) -> None:
        for table in tables:
            table.cache_clear()
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        name = "READER" if group == registry.ENTRY_POINTS else "METHOD"
        (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}:{name}\n")
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield install
    for table in tables:
        table.cache_clear()
