"""docs/matrix.md is what was recorded, and what it points at is there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("matrix_page", ROOT / "scripts/matrix_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(script: Any) -> Any:
    return json.loads(script.RECORD.read_text(encoding="utf-8"))


def test_the_page_is_up_to_date(script: Any, recorded: Any) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(recorded), "scripts/matrix_page.py"


def test_every_cell_was_right_or_refused_as_meant(script: Any, recorded: Any) -> None:
    for column in recorded.values():
        assert set(column["cells"]) <= set(script.ROWS)
        assert {c["state"] for c in column["cells"].values()} <= {
            "right", "refused", "not testable here"
        }  # fmt: skip


def test_no_field_is_empty(script: Any, recorded: Any) -> None:
    rows = [line for line in script.page(recorded).splitlines() if line.startswith("| ")]
    assert len(rows) > 25
    for row in rows[2:]:
        assert "|  |" not in row, row


def test_tests_that_prove_something_are_there(script: Any, recorded: Any) -> None:
    named = [test for tests in script.PROVED.values() for test in tests]
    named += [column["test"] for column in recorded.values()]
    named += re.findall(r"`(tests/[\w/]+\.py)`", " ".join(script.NOT_HERE.values()))
    for node in named:
        path, _, name = re.sub(r"\[.*", "", node).partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, node
    for tests in script.PROVED.values():
        assert all(set(rows) <= set(script.ROWS) for rows in tests.values())
