"""What fuzzing found (`make fuzz`): folders and texts that once gave something else than an adapter
or an `AdapterError`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_adapters import GOOD, weights_file

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.paths import resolve_inside
from vllm_lora_ext.errors import AdapterError

CONFIG = "adapter_config.json"
HALF = "\ud800"  # half a character: JSON may hold it, no file's name and no answer can


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return shutil.copytree(GOOD["plain-a"], tmp_path / "place")


def code_of(place: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(place)
    str(caught.value).encode()
    return caught.value.code


def test_an_error_can_be_sent(place):
    error = AdapterError("bad_value", f"{HALF} is wrong", seen=[HALF], limit=HALF, fix=HALF)
    for text in (str(error), error.text, error.message):
        assert "ud800" in text.encode().decode()
    again = AdapterError.parse(str(error))
    assert again is not None and again.text == error.text


@pytest.mark.parametrize("key", ["peft_type", "target_modules", "bias", "new_key", HALF])
def test_half_a_character_in_a_config(place, key):
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | {key: HALF}))
    assert code_of(place) == "bad_json"


def test_half_a_character_that_stands_there_twice(place):
    (place / CONFIG).write_text('{"\\ud800": 1, "\\ud800": 2}')
    assert code_of(place) == "bad_json"


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [40, 900, 985, 100_000])
def test_a_config_of_any_depth(place, opening, depth):
    """One that can just be read could not be shown."""
    closing = {"[": "]", '{"a":': "}"}[opening]
    text = '{"peft_type": "LORA", "target_modules": ' + opening * depth + "1" + closing * depth
    (place / CONFIG).write_text(text + "}")
    assert code_of(place) == "bad_json"


def test_an_error_is_no_longer_than_a_page(place):
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | {"k" * 1_000_000: 1}))
    with pytest.raises(AdapterError) as caught:
        load_adapter(place)
    assert caught.value.code == "unknown_key" and len(str(caught.value)) < 8000


@pytest.mark.parametrize("file", [f"{HALF}.safetensors", "x" * 300 + ".safetensors",
                                  "a\0.safetensors", "..safetensors"])  # fmt: skip
def test_an_index_that_names_no_file(place, file):
    weights = weights_file(place)
    weights.rename(place / "kept")
    index: dict[str, Any] = {"weight_map": {"a": file}}
    (place / f"{weights.name}.index.json").write_text(json.dumps(index))
    assert code_of(place) in ("missing_file", "path_not_allowed", "bad_file", "bad_json")


def test_a_path_that_is_no_path(tmp_path):
    for path in (HALF, f"a/{HALF}"):
        with pytest.raises(AdapterError) as caught:
            resolve_inside(path, [tmp_path])
        assert caught.value.code == "path_not_allowed"
    with pytest.raises(AdapterError) as caught:
        load_adapter(resolve_inside("x" * 5000, [tmp_path]))
    assert caught.value.code == "not_found"
