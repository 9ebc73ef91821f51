"""Every patch is held against the code it was written for; a changed target is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_lora_ext import plugin
from vllm_lora_ext.cli import app
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import check
from vllm_lora_ext.model_patches.register import PATCHES

TARGETS = [target for patch in PATCHES for target in patch.targets]


@pytest.fixture
def tree(tmp_path) -> Path:
    """The installed vLLM's files that hold targets, in a folder of their own."""
    root = check.installed_root()
    for module in {t.module for t in TARGETS}:
        path = Path(*module.split("."))
        source = (root / path).with_suffix(".py")
        source = source if source.is_file() else root / path / "__init__.py"
        copy = tmp_path / source.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    return tmp_path


def test_installed_vllm_is_known():
    findings = check.check_tree(check.installed_root(), check.installed_version())
    assert len(findings) == len(TARGETS)
    assert [f for f in findings if f.state != "ok"] == []


def test_every_target_was_recorded_on_every_version():
    """`targets.json` holds each target of the register for each release, and nothing else."""
    for patch in PATCHES:
        assert patch.targets
        assert all((patch.why, patch.how, patch.upstream, patch.remove_when))
    record = check.recorded()
    assert set(record) == {"0.32.0", "0.33.0"}
    names = {str(target) for target in TARGETS}
    for release, found in record.items():
        assert set(found) == names, f"run `make check-vllm VERSION={release} RECORD=1`"
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in found.values())


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_changed_target_is_found(installed, target):
    """A comment more inside the target, and only what holds that line is called changed."""
    sources, lines = installed
    text, parsed = sources.parsed[target.module]
    changed = text.splitlines()
    changed[lines[str(target)] - 1] += "  # changed upstream"
    sources.parsed[target.module] = "\n".join(changed), parsed
    found = {f.target: f.state for f in check.check_sources(sources) if f.state != "ok"}
    sources.parsed[target.module] = text, parsed
    assert found[str(target)] == "changed"
    assert all(str(target).startswith(name) for name in found)


@pytest.fixture(scope="module")
def installed() -> tuple[check.VllmSources, dict[str, int]]:
    """The installed vLLM, parsed once, and the line of every target."""
    sources = check.VllmSources(check.installed_root())
    findings = check.check_sources(sources)
    assert {f.state for f in findings} == {"ok"}
    return sources, {f.target: f.line for f in findings}


@pytest.fixture
def record_file(tmp_path, monkeypatch) -> Path:
    """A copy of `targets.json` that may be written."""
    copy = tmp_path / "targets.json"
    shutil.copy(check.RECORD, copy)
    monkeypatch.setattr(check, "RECORD", copy)
    return copy


def test_recorded_sources_are_ok(tree, record_file):
    """A changed release is refused until it is recorded; other releases stay as they were."""
    file = tree / "vllm/lora/worker_manager.py"
    file.write_text(
        file.read_text().replace("def _load_adapter(self,", "def _load_adapter(self, /,")
    )
    assert [f.state for f in check.check_tree(tree, "0.32.0") if f.state != "ok"] == ["changed"]
    before = check.recorded()
    check.record(tree, "0.34.0")
    assert {f.state for f in check.check_tree(tree, "0.34.0")} == {"ok"}
    assert {f.detail for f in check.check_tree(tree, "0.34.0")} == {"as in 0.34.0"}
    after = check.recorded()
    assert list(after) == ["0.32.0", "0.33.0", "0.34.0"]
    assert {release: after[release] for release in before} == before


def test_record_twice_writes_the_committed_file(record_file):
    """`targets.json` is what the command writes: nobody edits it by hand."""
    committed = record_file.read_text()
    done = CliRunner().invoke(app, ["check-vllm", "--record"])
    assert done.exit_code == 0, done.stdout
    assert "every patch fits" in done.stdout
    assert record_file.read_text() == committed


def test_record_forgets_what_the_register_no_longer_has(record_file, monkeypatch):
    """And a target that is not recorded is told apart from one that changed."""
    gone = str(PATCHES[0].targets[0])
    monkeypatch.setattr(check, "PATCHES", PATCHES[1:])
    check.record(check.installed_root(), check.installed_version())
    assert not any(gone in found for found in check.recorded().values())
    monkeypatch.setattr(check, "PATCHES", PATCHES)
    findings = {f.target: f for f in check.check_tree(check.installed_root())}
    assert findings[gone].state == "changed"
    assert "not recorded for any release" in findings[gone].detail


def test_record_refuses_a_release_without_a_target(tree, record_file):
    before = record_file.read_text()
    (tree / "vllm/platforms/cpu.py").unlink()
    for version, message in (("0.32.0", "1 targets are missing"), (None, "no release number")):
        with pytest.raises(AdapterError, match=message):
            check.record(tree, version)
    assert record_file.read_text() == before


def test_lora_does_not_start_on_a_changed_target(tree, monkeypatch):
    """The line names the target and what to do; nothing is patched."""
    from vllm.config import LoRAConfig

    path = tree / "vllm/lora/worker_manager.py"
    path.write_text(
        path.read_text().replace("def _load_adapter(self,", "def _load_adapter(self, /,")
    )
    applied = []
    monkeypatch.setattr(check, "installed_root", lambda: tree)
    monkeypatch.setattr("vllm_lora_ext.model_patches.register.Patch.apply", applied.append)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delenv("VLLM_LORA_EXT_UNCHECKED", raising=False)
    monkeypatch.setattr(LoRAConfig, "__init__", LoRAConfig.__init__)
    plugin.register()
    with pytest.raises(RuntimeError, match=r"WorkerLoRAManager\._load_adapter is changed") as error:
        LoRAConfig(max_lora_rank=8)
    assert "VLLM_LORA_EXT_DISABLE=1" in str(error.value)
    assert applied == []


def test_a_missing_target_and_a_broken_file_are_named(tree):
    (tree / "vllm/platforms/cpu.py").unlink()
    (tree / "vllm/v1/engine/async_llm.py").write_text("def broken(:\n")
    states = {f.target: f.state for f in check.check_tree(tree)}
    assert states["vllm.platforms.cpu.CpuPlatform.check_and_update_config"] == "missing"
    assert states["vllm.v1.engine.async_llm.AsyncLLM.add_request"] == "missing"


def test_the_switch_turns_every_patch_off(monkeypatch):
    applied = []
    monkeypatch.setattr("vllm_lora_ext.model_patches.register.Patch.apply", applied.append)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setenv("VLLM_LORA_EXT_DISABLE", "1")
    plugin.register()
    assert applied == []
