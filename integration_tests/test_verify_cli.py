"""`vllm-lora-ext verify --engine`: that it passes what is right, and fails what is not."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from integration_tests import forked, reference_model
from integration_tests.engines import ENVIRONMENT, base_path, lora, recorded
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.verify import TOLERANCES, compare_engine, follow, random_prompts

pytestmark = pytest.mark.engine


def sequences(name: str):
    fx = recorded(name)
    model, adapter = reference_model.model(fx.base), load_adapter(fx.folder)
    prompts = random_prompts(model, adapter)
    return follow(model, adapter, prompts), follow(model, None, prompts)


def test_an_engine_agrees(llama_eager):
    for name in ("plain-a", "loramoe-a"):
        request = lora(f"verify-{name}", recorded(name).folder)
        for found in compare_engine(llama_eager, request, *sequences(name)):
            print(f"{name}, {found.what}: {found.largest:.1e} of {found.values} values")
            assert found.largest < TOLERANCES["float32"]
            assert found.greedy == 1.0


def test_another_adapter_is_told_apart(llama_eager):
    wrong = lora("verify-wrong", recorded("plain-a").folder)
    mine, base = compare_engine(llama_eager, wrong, *sequences("loramoe-a"))
    assert mine.largest > 0.1 and mine.greedy < 1.0
    assert base.largest < TOLERANCES["float32"]


def test_a_refused_adapter_keeps_its_code(llama_eager, tmp_path):
    with pytest.raises(AdapterError) as caught:
        compare_engine(llama_eager, lora("verify-none", tmp_path), *sequences("plain-a"))
    assert caught.value.code == "missing_file"


@pytest.mark.slow
def test_the_command_starts_its_own_engine(tmp_path):
    """With a setting that stands in no file, so that the engine is given the native copy."""
    folder = shutil.copytree(recorded("meteora-a").folder, tmp_path / "bare")
    given = json.loads((folder / "routing.json").read_text())
    (folder / "routing.json").unlink()
    settings = [w for key, value in given.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "vllm_lora_ext.cli", "verify", str(folder), "--json"]
    command += ["--base", str(base_path("base_qwen2")), "--engine", *settings]
    arguments = [*command, "--engine-args", '{"block_size": 32}']
    done = forked.run(arguments, tmp_path, os.environ | ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    engine = {c["what"]: c for c in found["comparisons"]}["vLLM"]
    assert engine["largest"] < TOLERANCES["float32"] and engine["greedy"] == 1.0
    assert found["effect"] > 0.1
