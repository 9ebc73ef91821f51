"""The rows of benchmarks/merging_speed.py: what is compared with what."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "merging_speed.py"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it has modules beside it
    spec = importlib.util.spec_from_file_location("merging_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method: str, tool: str, on: str = "4096 x 4096", **more: float) -> dict[str, Any]:
    return {"method": method, "tool": tool, "on": on, "peak_mb": 1, "process_mb": 2, **more}


def test_a_ratio_counts_the_whole_way_of_the_other_tool_to_an_adapter(speed: Any) -> None:
    rows = [
        row("ties", "default", merge_s=0.1),
        row("ties", "compat: mergekit", read_s=9.0, merge_s=2.0, norm=0.99),
        row("ties", "mergekit", read_s=9.0, base_s=1.0, merge_s=4.0, extract_s=15.0, norm=1.0),
    ]
    default, ours, theirs = speed.with_ratios(rows)
    assert ours["theirs_by_ours"] == 10.0
    assert ours["norm_by_theirs"] == 0.99
    assert (default, theirs) == (rows[0], rows[2])


def test_a_ratio_needs_the_same_tool_on_the_same_shapes(speed: Any) -> None:
    rows = [
        row("ties", "compat: peft", "32 layers", merge_s=2.0),
        row("ties", "compat: mergekit", merge_s=2.0),
        row("ties", "peft", "32 layers", merge_s=3.0),
    ]
    peft, mergekit, _ = speed.with_ratios(rows)
    assert peft["theirs_by_ours"] == 1.5
    assert "theirs_by_ours" not in mergekit
