"""Builds `cpu.cpp` at first use: seconds with g++, no PyTorch headers, kept in a cache.

The cache's key holds the sources, the flags, the compiler and the processor, so a folder shared by
different machines is safe. Whatever goes wrong leads to the PyTorch path and one line in the log.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_lora_ext.kernels.gated_lora import codes

logger = logging.getLogger("vllm.lora_ext")

_NAMES = ("cpu.cpp", "cpu_gate.h", "cpu_op.h", "cpu_vec.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp", "-Wno-psabi",
)  # fmt: skip
BUILD_SECONDS = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built or taken from the cache; None where that is not possible."""
    try:
        return _load(cache_folder())
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "vllm-lora-ext: C++ kernels cannot be built, the slower PyTorch path is used (%s). "
            "They need g++, or another compiler with OpenMP of GCC's kind named by CXX.",
            _reason(error),
        )
        return None


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/vllm-lora-ext`, or a private temporary folder where that is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-lora-ext"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="vllm-lora-ext-"))


def _load(folder: Path) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no compiler {compiler[0]!r}")
    built = folder / f"gated_lora-{_key(compiler)}.so"
    # Tensor-parallel workers start together: one builds, the others wait.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(compiler, built)
    return ctypes.CDLL(str(built))


def _build(compiler: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        part, whole = Path(scratch, "cpu.o"), Path(scratch, "cpu.so")
        Path(scratch, "codes.h").write_text(codes.header())
        _run([*compiler, *FLAGS, f"-I{scratch}", "-c", str(SOURCES[0]), "-o", str(part)])
        # Not linked with OpenMP: its symbols must come from the runtime that PyTorch has loaded,
        # whose threads vLLM binds to cores. A second runtime would fight with it.
        _run([*compiler, "-shared", str(part), "-o", str(whole)])
        whole.replace(built)


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True
    )
    return done.stdout


def _key(compiler: list[str]) -> str:
    parts = [codes.header(), *(path.read_text() for path in SOURCES)]
    parts += [*compiler, *FLAGS, _run([*compiler, "--version"]), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in first if line.startswith(names))


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
