"""Every patch is held against the code it was written for; a changed target is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vllm_lora_ext import plugin
from vllm_lora_ext.model_patches import check
from vllm_lora_ext.model_patches.register import PATCHES, VERSIONS

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
    for patch in PATCHES:
        assert patch.targets
        assert all((patch.why, patch.how, patch.upstream, patch.remove_when))
    assert all(set(t.sha256) == set(VERSIONS) for t in TARGETS)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_changed_target_is_found(tree, target):
    """One more line inside the target, and only that target is called changed."""
    path = tree.joinpath(*target.module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    before = {f.target for f in check.check_tree(tree) if f.state != "ok"}
    assert before == set()
    line = next(f.line for f in check.check_tree(tree) if f.target == str(target))
    lines = path.read_text().splitlines()
    lines[line - 1] += "  # changed upstream"
    path.write_text("\n".join(lines) + "\n")
    found = {f.target: f.state for f in check.check_tree(tree) if f.state != "ok"}
    assert found[str(target)] == "changed"


def test_vllm_does_not_start_on_a_changed_target(tree, monkeypatch):
    """The line names the target and what to do; nothing is patched."""
    path = tree / "vllm/lora/worker_manager.py"
    path.write_text(
        path.read_text().replace("def _load_adapter(self,", "def _load_adapter(self, /,")
    )
    applied = []
    monkeypatch.setattr(check, "installed_root", lambda: tree)
    monkeypatch.setattr("vllm_lora_ext.model_patches.register.Patch.apply", applied.append)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delenv("VLLM_LORA_EXT_UNCHECKED", raising=False)
    with pytest.raises(RuntimeError, match=r"WorkerLoRAManager\._load_adapter is changed") as error:
        plugin.register()
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
