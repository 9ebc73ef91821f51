"""The lint of callers finds what only tests use, and nothing in this repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def lint() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lint_callers", ROOT / "scripts/lint_callers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lint_callers"] = module
    spec.loader.exec_module(module)
    return module


MADE = """
from torch import nn

def used(a, b=1, *, c=2, d=3):
    return a

def documented(e=0):
    return e

def only_tests():
    return only_tests()

class Store:
    def __init__(self, size, limit=4):
        self.size = size

    def close(self):
        pass

    def read(self, name, strict=False):
        return name

class Layer(nn.Module):
    def forward(self, x):
        return x
"""
CALLER = """
import os

from vllm_lora_ext.made import Store, used as helper

def run(file):
    only_tests = 1
    os.close(only_tests)
    helper(1, c=2)
    return Store(3).read("x", True)
"""
STRANGER = """
def other(thing):
    thing.close()
"""


def tree(root: Path, caller: str = CALLER) -> Path:
    (root / "vllm_lora_ext").mkdir()
    (root / "docs").mkdir()
    files = {"made": MADE, "caller": caller, "stranger": STRANGER, "plugin": "import os"}
    for name, text in files.items():
        (root / "vllm_lora_ext" / f"{name}.py").write_text(text)
    (root / "docs" / "page.md").write_text("Call `documented(e=3)`, or `--run this`.\n")
    (root / "docs" / "run.md").write_text(
        "```python\nfrom vllm_lora_ext.caller import run\nrun(1)\n```"
    )
    return root


def test_what_only_tests_use_is_found(lint: ModuleType, tmp_path: Path) -> None:
    """A recursive call, a local variable, `os.close` and a stranger's `close` are no callers."""
    at = "vllm_lora_ext."
    assert lint.findings(tree(tmp_path)) == [
        f"{at}made.used(b): no production call passes it",
        f"{at}made.used(d): no production call passes it",
        f"{at}made.only_tests: nothing but tests calls it",
        f"{at}made.Store.__init__(limit): no production call passes it",
        f"{at}made.Store.close: nothing but tests calls it",
        f"{at}stranger.other: nothing but tests calls it",
    ]


@pytest.mark.parametrize(
    "rest", ["helper(*file)", "file.map(helper)", "partial(helper, 1, 2, d=4)"]
)
def test_what_may_pass_anything_is_no_finding(lint: ModuleType, rest: str, tmp_path: Path) -> None:
    caller = CALLER.replace("helper(1, c=2)", f"helper(1, c=2); {rest}")
    found = lint.findings(tree(tmp_path, caller))
    assert not [line for line in found if "used" in line]


def test_allowed_findings_need_to_be_there(lint: ModuleType) -> None:
    found = ["a.b.c: nothing", "a.d(x): no"]
    assert lint.judge(found, {}) == found
    assert lint.judge(found, {"a.*.c": "because", "a.d(x)": "because"}) == []
    assert lint.judge(found[:1], {"a.b.c": "because", "a.d(x)": "because"}) == [
        "a.d(x): allowed, and nothing needs it"
    ]


def test_this_repository_has_none(lint: ModuleType) -> None:
    assert lint.judge(lint.findings(ROOT), lint.ALLOWED) == []
    assert all(lint.ALLOWED.values())
