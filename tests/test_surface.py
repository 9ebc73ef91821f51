"""docs/surface.json is what users can rely on: a change of it is seen, and told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surface", ROOT / "scripts" / "surface.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()


def test_the_file_is_the_surface() -> None:
    written = json.loads(script.FILE.read_text(encoding="utf-8"))
    found = script.surface()
    assert set(written) == set(found)
    for part, value in found.items():
        assert written[part] == value, f"{part}: `make surface`, and say it in CHANGELOG.md"


def test_nothing_of_it_is_empty() -> None:
    found = script.surface()
    assert all(found.values())
    assert {"/v1/lora_ext/adapters", "x-lora-ext-version"} <= set(found["http"])
    assert "lora_ext:refusals_total" in found["metrics"]
    assert "VLLM_LORA_EXT_DISABLE" in found["environment"]
    assert found["merge methods"]["ties"]["density"] == 0.2
    assert "vllm_lora_ext.merge_methods" in found["entry points of other packages"]
    assert found["commands"]["convert"]["--rank"] is None
    assert found["error codes"]["not_found"] == "404"
