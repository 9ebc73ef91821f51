"""Two engines in one process are independent, also where the second loads the first one's code.

In a process of its own: the switch that keeps engines in the script's process is read once, and
the compile cache must be empty at first.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from integration_tests import forked
from integration_tests.engines import ENVIRONMENT

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | ENVIRONMENT
    environment |= {"VLLM_CACHE_ROOT": str(folder), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = forked.run(
        [sys.executable, "-m", "integration_tests.two_engines", str(folder / "result.json")],
        folder, environment, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_only_the_first_start_compiles(answers: dict[str, Any]) -> None:
    assert [(s["compiled"], s["loaded"]) for s in answers["starts"]] == [(1, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    "when", ["the first alone", "both", "the first dropped", "a third", "the third dropped"]
)
def test_every_engine_gives_its_own_adapters_numbers(answers: dict[str, Any], when: str) -> None:
    """Each holds another adapter in the same slot; the numbers are those recorded elsewhere."""
    errors = answers["errors"][when]
    assert errors
    for engine, per_request in errors.items():
        for request, worst in per_request.items():
            assert worst < TOLERANCE, (engine, request)
