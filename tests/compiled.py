"""Tests of the compiled kernels are skipped without a compiler, and fail where the build does."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest

from vllm_lora_ext.kernels.gated_lora.backends.native import build


def need_compiled() -> None:
    """Skips a test only where the machine has no compiler."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]  # as `build` chooses it
    if shutil.which(compiler) is None:
        pytest.skip("no compiler")
    assert build.library() is not None, f"{compiler} is here, but the C++ kernels do not build"
