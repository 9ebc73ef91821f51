"""An adapter that is tensors in memory: what a folder of the same files is, and refused alike."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_adapters import BAD, GOOD, build_bad
from safetensors.torch import load_file

from vllm_lora_ext.adapters.memory import MemorySource, load_memory_adapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError


def tensors_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    config = folder / "adapter_config.json"
    (weights,) = folder.glob("*.safetensors")
    return load_file(weights), json.loads(config.read_text()) if config.is_file() else None


def same(got: Any, wanted: Any) -> None:
    assert got.system == wanted.system and got.modules.keys() == wanted.modules.keys()
    for name, module in wanted.modules.items():
        for key, value in vars(module).items():
            other = getattr(got.modules[name], key)
            same_value = torch.equal(other, value) if torch.is_tensor(value) else other == value
            assert same_value, f"{name}.{key}"


@pytest.mark.parametrize("name", ["plain-a", "loramoe-a"])
def test_is_what_the_folder_is(name, tmp_path):
    for folder in (GOOD[name], write_native(load_adapter(GOOD[name]), tmp_path / "native")):
        source = MemorySource.of(*tensors_of(Path(folder)))
        adapter = load_memory_adapter(source)
        same(adapter, load_adapter(folder))
        assert adapter.digest == load_memory_adapter(source).digest


def test_other_content_is_another_version():
    tensors, config = tensors_of(Path(GOOD["plain-a"]))
    first = load_memory_adapter(MemorySource.of(tensors, config)).digest
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    assert load_memory_adapter(MemorySource.of(tensors, config)).digest != first
    assert load_memory_adapter(MemorySource.of(tensors, config)).digest != first


def code_of(load: Any, *args: Any) -> str:
    try:
        load(*args)
    except AdapterError as error:
        return error.code
    return "served"


def test_a_bad_one_is_refused_with_the_folders_code(tmp_path):
    """Wherever tensors and configuration are all that the folder says."""
    written = ("path_not_allowed", "bad_json", "unexpected_file", "missing_file")
    seen = []
    for name, bad in BAD.items():
        # Not those with settings or folders in a folder; a long text is not handed over as text.
        alone = bad.good in ("plain-a", "loramoe-a")
        if bad.stage == "load" and alone and name != "config_5_mib":
            folder = tmp_path / name
            build_bad(name, folder)
            try:
                tensors, config = tensors_of(folder)
            except Exception:  # not even a state dict
                continue
            if bad.code not in written:
                source = MemorySource.of(tensors, config)
                assert code_of(load_memory_adapter, source) == bad.code, name
                seen.append(name)
    assert len(seen) >= 40


class Kind(enum.StrEnum):
    LORA = "LORA"


def test_takes_what_peft_has_in_memory():
    """Sets, enums, tensors on the way through autograd, views that share memory."""
    tensors, config = tensors_of(Path(GOOD["plain-a"]))
    loose = {n: torch.nn.Parameter(t.t().clone()).t() for n, t in tensors.items()}
    config |= {"peft_type": Kind.LORA, "target_modules": set(config["target_modules"])}
    same(load_memory_adapter(MemorySource.of(loose, config)), load_adapter(GOOD["plain-a"]))


@pytest.mark.parametrize(
    ("tensors", "config"),
    [({"a": [1.0]}, {}), ({1: torch.ones(1)}, {}), ({}, {"peft_type": object()})],
)
def test_what_is_no_adapter_at_all(tensors, config):
    with pytest.raises(AdapterError) as caught:
        MemorySource.of(tensors, config)
    assert caught.value.code == "bad_value"


def test_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_memory_adapter(MemorySource.of(*tensors_of(Path(GOOD["plain-a"]))))
    with pytest.raises(AdapterError):
        load_memory_adapter(MemorySource(b"", None))
    assert list(tmp_path.iterdir()) == []
