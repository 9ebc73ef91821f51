"""vLLM's own LoRA tests with the plugin's classes in the place of stock's.

    python scripts/test_upstream.py             the installed vLLM's release
    python scripts/test_upstream.py -k manager  arguments for pytest

Fetches the source distribution of that release once (44 MB, kept below build/upstream, never
committed), and runs what needs no GPU; for models and adapters of the hub there are tiny stand-ins
(`scripts/upstream/hub.py`). What is not run and what cannot hold is listed with its reason in
`scripts/upstream/exceptions.toml`; a file in no list, or an exception that holds, is an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

from upstream.hub import write

from vllm_lora_ext.model_patches.check import installed_version

REPO = Path(__file__).resolve().parents[1]
HERE = REPO / "scripts" / "upstream"
BUILD = REPO / "build" / "upstream"
TESTS = "tests/lora"
REQUIREMENTS = REPO / "requirements" / "upstream.txt"


def main(arguments: list[str]) -> int:
    version = installed_version()
    if version is None:
        sys.exit("no vLLM is installed here: make venv")
    listed = tomllib.loads((HERE / "exceptions.toml").read_text())
    packages = _packages()
    root = _sources(version, packages)
    if wrong := unlisted(root / TESTS, listed):
        sys.exit("scripts/upstream/exceptions.toml: " + "; ".join(wrong))
    shutil.copy(HERE / "plugin.py", packages / "upstream_plugin.py")
    write(BUILD / "hub")
    command = [sys.executable, "-m", "pytest", "-p", "upstream_plugin", "-p", "no:cacheprovider"]
    command += ["-c", "pyproject.toml", "--rootdir", ".", "-q", "-rfEx", "--timeout", "300"]
    command += [f"--deselect={TESTS}/{test}" for test in listed["left_out"] if "::" in test]
    command += [*arguments, *(f"{TESTS}/{file}" for file in listed["files"])]
    environment = os.environ | {
        "PYTHONPATH": str(packages),
        "UPSTREAM_EXCEPTIONS": json.dumps(listed["known"]),
        "HF_HOME": str(BUILD / "hub"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "lora_ext",
    }
    return subprocess.run(command, cwd=root, env=environment).returncode


def unlisted(folder: Path, listed: dict[str, Any]) -> list[str]:
    """What is wrong with the lists for the tests in `folder`: each file stands in one of them."""
    there = {path.name for path in folder.glob("test_*.py")}
    run, left_out = set(listed["files"]), {test for test in listed["left_out"] if "::" not in test}
    reasons = listed["left_out"] | listed["known"]
    return [
        *(f"{name} is in no list" for name in sorted(there - run - left_out)),
        *(f"{name} is in both lists" for name in sorted(run & left_out)),
        *(f"{name} is not there" for name in sorted((run | left_out) - there)),
        *(f"{name} has no reason" for name, reason in reasons.items() if not reason),
    ]


def _packages() -> Path:
    """What these tests need beside the environment, in a folder of its own."""
    folder = BUILD / "packages"
    if not folder.exists():
        _pip("install", "--quiet", "--no-deps", "--target", str(folder), "-r", str(REQUIREMENTS))
    return folder


def _sources(version: str, packages: Path) -> Path:
    root = BUILD / f"vllm-{version}"
    if not root.exists():
        _pip(
            "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
            "--dest", str(BUILD), f"vllm=={version}",
            # pip asks the package for its metadata: nothing is to be built for it.
            PYTHONPATH=str(packages), VLLM_TARGET_DEVICE="empty", VLLM_VERSION_OVERRIDE=version,
        )  # fmt: skip
        with tarfile.open(BUILD / f"vllm-{version}.tar.gz") as archive:
            wanted = (f"{root.name}/tests/", f"{root.name}/pyproject.toml")
            members = [m for m in archive.getmembers() if m.name.startswith(wanted)]
            archive.extractall(BUILD, members=members, filter="data")
    return root


def _pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=os.environ | environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
