"""Workflows and hooks do what `make` does, a tag is the version, docs/support.md is as recorded."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from vllm_lora_ext.model_patches.check import recorded

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        assert job["timeout-minutes"]
        yield from job["steps"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_and_pinned_actions_only(workflow: Path) -> None:
    ran = 0
    for step in _steps(workflow):
        if "run" in step:
            words = re.sub(r"\w+=(\$\{\{.*?\}\}|\S*)", "", step["run"]).split()
            assert words[0] == "make" and set(words[1:]) <= TARGETS, step
            ran += 1
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step["uses"]), step
    assert ran


def test_together_they_run_what_ci_runs() -> None:
    (tests,) = [path for path in WORKFLOWS if path.name == "tests.yml"]
    called = {word for step in _steps(tests) for word in step.get("run", "").split()}
    (wanted,) = re.findall(r"^test: ([a-z -]+) ##", MAKEFILE, re.MULTILINE)
    assert set(wanted.split()) <= called


def test_hooks_are_the_checks_of_make() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = " ".join(hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"])
    bodies = [MAKEFILE.split(f"\n{name}:")[1].split("\n\n")[0] for name in ("lint", "types")]
    for command in re.findall(r"\$\(BIN\)/(?:python (\S+)|(ruff \w+))", "".join(bodies)):
        assert "".join(command) in entries


def test_a_tag_must_be_the_version_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    script = _script("release_check")
    (version,) = set(script.versions().values())
    assert script.main(f"v{version}") == 0
    assert script.main("v99.0.0") == 1
    assert capsys.readouterr().out.count("the tag v99.0.0") == 3


def test_the_support_page_is_what_was_recorded() -> None:
    script = _script("support_page")
    record = json.loads(script.RECORD.read_text(encoding="utf-8"))
    text = script.PAGE.read_text(encoding="utf-8")
    assert text == script.page(text, record), "scripts/support_page.py"
    for release in recorded():
        assert f"| {release} |" in text
    for release, row in record["releases"].items():
        fits = row["targets"].get("ok") == sum(row["targets"].values())
        assert fits == (release in recorded()), release
