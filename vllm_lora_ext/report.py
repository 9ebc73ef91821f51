"""What an issue needs to be understood: `doctor`'s findings, and what vLLM collects itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_lora_ext.doctor import Machine, Report

_PREFIXES = ("VLLM_", "TORCH", "CUDA_", "OMP_", "RAY_", "TRITON_", "HF_HUB_")
_SECRET = ("secret", "token", "key", "api", "access", "password")
_SECONDS = 180  # vLLM asks every tool of the machine


def issue_text(report: Report, machine: Machine) -> str:
    """Markdown for an issue. Names of folders below the home, and secrets, are left out.

    Runs `python -m vllm.collect_env`, which imports vLLM.
    """
    versions = [f"{name} {version}" for name, version in report.versions.items() if version]
    lines = ["### vllm-lora-ext", "", "```text", ", ".join(versions)]
    lines += [f"{c.state:8} {c.name}: {c.seen}" for c in report.checks]
    lines += [
        f"{f.state:8} {f.target} ({f.patch}): {f.detail}"
        for f in report.patches if f.state != "ok"
    ]  # fmt: skip
    lines += ["```", "", "### Environment variables", "", "```text"]
    lines += [f"{name}={value}" for name, value in _open(machine.environ).items()] or ["none"]
    lines += ["```", "", "### vLLM's collect-env", "", "```text", _collected(), "```"]
    return "\n".join(lines).replace(str(Path.home()), "~")


def _open(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter here and hold no secret, by name."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIXES) and not any(word in name.lower() for word in _SECRET)
    }


def _collected() -> str:
    command = [sys.executable, "-P", "-m", "vllm.collect_env"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {_SECONDS} seconds"
    return (done.stdout if done.returncode == 0 else done.stderr[-2000:]).strip()
