"""The lists of vLLM's own tests: every file is run, or left out for a reason."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
LISTED = tomllib.loads((SCRIPTS / "upstream/exceptions.toml").read_text(encoding="utf-8"))


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import test_upstream

    for name in (*LISTED["files"], *LISTED["left_out"]):
        (tmp_path / name.partition("::")[0]).touch()
    yield lambda listed=LISTED: test_upstream.unlisted(tmp_path, listed)
    del sys.modules["test_upstream"]


def test_every_file_is_in_one_list(unlisted: Any, tmp_path: Path) -> None:
    assert unlisted() == []
    (tmp_path / "test_new.py").touch()
    assert unlisted() == ["test_new.py is in no list"]
    both = LISTED | {"files": [*LISTED["files"], "test_new.py", "test_whisper.py", "test_gone.py"]}
    assert unlisted(both) == ["test_whisper.py is in both lists", "test_gone.py is not there"]
    silent = LISTED | {"known": {"*test_new*": ""}}
    assert unlisted(silent) == ["test_new.py is in no list", "*test_new* has no reason"]


def test_what_is_left_out_of_a_file_is_of_one_that_runs() -> None:
    tests = [test.partition("::")[0] for test in LISTED["left_out"] if "::" in test]
    assert set(tests) <= set(LISTED["files"])


def test_ours_are_there() -> None:
    """Where a reason names a test of this repository."""
    ours = [r.partition("ours: ")[2] for r in LISTED["left_out"].values() if "ours: " in r]
    assert ours and all((SCRIPTS.parent / path).is_file() for path in ours)
