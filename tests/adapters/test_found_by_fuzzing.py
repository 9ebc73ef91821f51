"""What fuzzing found (`make fuzz`): folders, files and texts that once gave something else than
what they are for or an `AdapterError`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_adapters import GOOD, weights_file
from merging.random_factors import random_factors
from safetensors.torch import save_file

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.paths import resolve_inside
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import save_peft
from vllm_lora_ext.merging.generate.icm import read_layout
from vllm_lora_ext.merging.recipes import parse_recipe
from vllm_lora_ext.merging.recipes.lock import LOCK
from vllm_lora_ext.merging.recipes.store import Store
from vllm_lora_ext.merging.variants.files import INDEX, Checkpoint
from vllm_lora_ext.trace import Trace

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


def trace_text(module: str = "up", weight: str = "1", experts: str = "2", tokens: int = 1) -> str:
    ids = ", ".join(["1"] * tokens)
    rows = ", ".join([f"[{weight}]"] * tokens), ", ".join(["[0]"] * tokens)
    return (
        '{"format": "vllm-lora-ext trace 1", "adapter": "", "system": "", "base": "",'
        f' "prompt_tokens": 0, "token_ids": [{ids}], "tokens": null, "modules": {{"{module}":'
        f' {{"num_experts": {experts}, "experts": [{rows[1]}], "weights": [{rows[0]}]}}}}}}'
    )


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[" * 100_000, "bad_json"), (trace_text(module=HALF), "bad_json"),
        (trace_text(module="\\ud800"), "bad_json"), (trace_text(weight="1e999"), "bad_json"),
        (trace_text(weight="1e39"), "bad_value"), (trace_text(weight="9" * 400), "bad_value"),
        (trace_text(weight="1" + "0" * 40), "bad_value"),
        (trace_text(experts="65536", tokens=1100), "too_large"),
    ],
    ids=["deep", "half", "half said", "infinite", "large", "digits", "whole", "memory"],
)  # fmt: skip
def test_a_trace_of_anything(text, code):
    with pytest.raises(AdapterError) as caught:
        Trace.from_json(text)
    assert caught.value.code == code
    str(caught.value).encode()


def test_a_trace_that_fits_and_whose_module_has_many_digits():
    trace = Trace.from_json(trace_text(module="a." + "9" * 5000, weight=str(2**70)))
    assert Trace.merged([trace, trace]).usage()


@pytest.mark.parametrize("parts", [[], ["a"], {"a": ["b"]}, {"a": None}, "a", 5, True])
def test_a_checkpoint_s_index_of_anything(tmp_path, parts):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(AdapterError) as caught:
        Checkpoint(tmp_path)
    assert caught.value.code in ("bad_value", "missing_file")


@pytest.mark.parametrize("key", ["mean", "std", "length"])
def test_a_layout_of_hundreds_of_digits(tmp_path, key):
    entry = {"mean": 0, "std": 1, "length": 1, "shape": [1], key: 10**400}
    (tmp_path / "layout.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(AdapterError) as caught:
        read_layout(tmp_path / "layout.json")
    assert caught.value.code == "bad_value"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"rank": 1e999, "report": {}}',
                                     '{"rank": -1, "report": {}}', "\0"])  # fmt: skip
def test_what_lies_in_a_store_wrongly_is_made_again(tmp_path, content):
    save_peft(random_factors(1, 2), tmp_path / "a")
    recipe = parse_recipe({"version": 1, "merge_method": "cat", "models": [{"model": "a"}]})
    store = Store(tmp_path / "store", 1 << 30)
    built = store.get_or_build(recipe, tmp_path.joinpath)
    (built.path / LOCK).write_text(content)
    assert store.get_or_build(recipe, tmp_path.joinpath).rank == built.rank == 2
