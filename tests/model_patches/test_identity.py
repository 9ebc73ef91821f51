"""Compiled code is found again by the plugin that wrote it, and by nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.codecache import FxGraphHashDetails

from vllm_lora_ext.model_patches import identity

PROGRAM = Path(__file__).parent / "compile_keys.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `compile_keys` says with the plugin and as if it were not installed, of one cache."""
    environment = os.environ | {
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")), "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("VLLM_LORA_EXT_DISABLE", None)
    environment.pop("VLLM_USE_AOT_COMPILE", None)
    process = subprocess.run(
        [sys.executable, "-P", str(PROGRAM)], env=environment,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    answers: dict[str, dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    assert answers["plugin"]["plugin"] and not answers["stock"]["plugin"]
    return answers


def test_the_plugin_and_stock_keep_their_compiled_code_apart(found: dict[str, Any]) -> None:
    for ours, stocks in zip(found["plugin"]["lora"], found["stock"]["lora"], strict=True):
        assert ours != stocks


def test_a_changed_source_of_the_plugin_is_compiled_anew(found: dict[str, Any]) -> None:
    pairs = zip(found["plugin"]["lora"], found["plugin"]["changed lora"], strict=True)
    assert all(before != after for before, after in pairs)


def test_without_lora_the_key_is_stocks_own(found: dict[str, Any]) -> None:
    assert found["plugin"]["base"] == found["plugin"]["changed base"] == found["stock"]["base"]


def test_a_second_start_loads_what_the_first_one_compiled(found: dict[str, Any]) -> None:
    """The weights are the second engine's, and so are the numbers of rows."""
    assert found["plugin"]["warm lora"] == {"loaded": 1, "compiled": 1, "right": True}


def test_without_lora_vllm_compiles_as_it_always_did(found: dict[str, Any]) -> None:
    assert found["plugin"]["warm base"] == {"loaded": 0, "compiled": 2, "right": True}


def test_equal_layers_share_one_compiled_piece(found: dict[str, Any]) -> None:
    """Between two attentions every layer has the same piece; the first and the last one differ."""
    pieces = found["plugin"]["pieces"]
    assert pieces == {"layers": 5 + 1, "asked": 5 + 1, "compiled": 3}


@pytest.mark.parametrize(
    ("room", "file"),
    [
        ("kernels", "gated_lora/backends/native/inductor.py"),
        ("kernels", "gated_lora/backends/native/cpu.cpp"),
        ("kernels", "gated_lora/backends/native/cpu_op.h"),
        ("model_patches", "layers.py"),
        ("routing", "reference.py"),
    ],
)
def test_every_source_counts(
    room: str, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = Path.read_bytes
    changed: list[Path] = []

    def other(path: Path) -> bytes:
        if path.as_posix().endswith(f"{room}/{file}"):
            changed.append(path)
            return read(path) + b"changed"
        return read(path)

    before = identity.plugin_identity()
    monkeypatch.setattr(Path, "read_bytes", other)
    assert identity.plugin_identity.__wrapped__() != before
    assert len(changed) == 1


def test_torchs_own_caches_have_the_plugin_in_their_keys() -> None:
    def key() -> str:
        return FxGraphHashDetails(None, [], {}, []).cache_key_tag

    with torch.compiler.config.patch(cache_key_tag="mine"):
        identity.tag_torch_caches()
        once = key()
        identity.tag_torch_caches()
        assert key() == once
    assert once.startswith("mine") and identity.plugin_identity()[:16] in once
