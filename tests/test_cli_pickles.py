"""`convert --allow-pickle`: what a pickle may hold, and that none runs code."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import contents, good, nothing_else, run
from safetensors.torch import load_file

from vllm_lora_ext import unpickle
from vllm_lora_ext.adapters import Limits, load_adapter
from vllm_lora_ext.convert import differing
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.unpickle import copy_as_safetensors


def as_pickle(source: Path, folder: Path, name: str = "adapter_model.bin") -> Path:
    """A copy of an adapter whose tensors are in a pickle."""
    shutil.copytree(source, folder)
    weights = next(folder.glob("*.safetensors"))
    torch.save(load_file(weights), folder / name)
    weights.unlink()
    return folder


@pytest.mark.parametrize("name", ["loramoe-a", "hydralora-a", "mixlora-a", "moelora-a"])
def test_an_ordinary_bin_gives_the_same_adapter(name: str, tmp_path: Path) -> None:
    source = as_pickle(good(name), tmp_path / "in")
    before = contents(source)
    code, found = run("convert", source, tmp_path / "out")
    assert (code, found["error"]["code"]) == (1, "pickle_refused")
    code, found = run("convert", source, tmp_path / "out", "--allow-pickle")
    assert (code, found["pickles"]) == (0, ["adapter_model.bin"])
    assert differing(load_adapter(good(name)), load_adapter(tmp_path / "out")) == []
    assert contents(source) == before
    nothing_else(tmp_path, "in", "out")


@pytest.mark.parametrize(
    ("saved", "written"),
    [("adapter.pt", "adapter_model"), ("x.pth", "adapter_model"), ("pytorch_model.bin", "model")],
)
def test_names_of_pickles(saved: str, written: str, tmp_path: Path) -> None:
    source = as_pickle(good("plain-a"), tmp_path / "in", saved)
    for leftover in ("optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        (source / leftover).write_bytes(b"never read")
    assert copy_as_safetensors(source, tmp_path / "copy") == [saved]
    nothing_else(tmp_path / "copy", "adapter_config.json", f"{written}.safetensors")


def test_experts_in_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        as_pickle(good("plain-a"), tmp_path / "in" / name)
    (tmp_path / "in" / "link").symlink_to("/etc")
    done = copy_as_safetensors(tmp_path / "in", tmp_path / "copy")
    assert done == ["one/adapter_model.bin", "two/adapter_model.bin"]
    nothing_else(tmp_path / "copy", "one", "two")
    for name in ("one", "two"):
        assert (
            differing(load_adapter(tmp_path / "copy" / name), load_adapter(good("plain-a"))) == []
        )


class Evil:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


def refused(folder: Path, tmp_path: Path) -> str:
    code, found = run("convert", folder, tmp_path / "out", "--allow-pickle")
    assert code == 1
    assert not (tmp_path / "out").exists()
    return found["error"]["code"]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    source, witness = as_pickle(good("plain-a"), tmp_path / "in"), tmp_path / "witness"
    tensors = load_file(next(good("plain-a").glob("*.safetensors")))
    torch.save({**tensors, "x": Evil(witness)}, source / "adapter_model.bin")
    assert refused(source, tmp_path) == "pickle_refused"
    (source / "adapter_model.bin").write_bytes(pickle.dumps(Evil(witness)))
    assert refused(source, tmp_path) == "pickle_refused"
    assert not witness.exists()
    torch.load(_zip_of(source, witness), weights_only=False)
    assert witness.exists(), "the pickle of this test is harmless, so it shows nothing"


def _zip_of(folder: Path, witness: Path) -> Path:
    torch.save({"x": Evil(witness)}, folder / "evil.bin")
    return folder / "evil.bin"


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2), [torch.ones(2)], {}, {"a": 1}, {"a": {"b": torch.ones(2)}},
        {3: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
    ],
    ids=["tensor", "list", "empty", "number", "nested", "key", "sparse", "meta"],
)  # fmt: skip
def test_anything_but_a_dict_of_tensors_is_refused(value: Any, tmp_path: Path) -> None:
    source = as_pickle(good("plain-a"), tmp_path / "in")
    torch.save(value, source / "adapter_model.bin")
    assert refused(source, tmp_path) == "pickle_refused"


@pytest.mark.parametrize("cut", [0, 1, 100, 3000])
def test_broken_pickles_are_refused(cut: int, tmp_path: Path) -> None:
    source = as_pickle(good("plain-a"), tmp_path / "in")
    file = source / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:cut])
    assert refused(source, tmp_path) == "pickle_refused"


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file, by what its records grow to, and by what a tensor claims to be."""
    source = as_pickle(good("plain-a"), tmp_path / "in")
    file = source / "adapter_model.bin"

    def limit(**limits: int) -> None:
        monkeypatch.setattr(unpickle, "Limits", lambda: Limits(**limits))

    limit(read_bytes=1000)
    with pytest.raises(AdapterError, match="too large") as caught:
        copy_as_safetensors(source, tmp_path / "1")
    assert caught.value.code == "too_large"

    limit()
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, file)
    with pytest.raises(AdapterError) as caught:
        copy_as_safetensors(source, tmp_path / "2")
    assert caught.value.code == "too_large"

    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 22))
    limit(read_bytes=1 << 20)
    with pytest.raises(AdapterError) as caught:
        copy_as_safetensors(source, tmp_path / "3")
    assert caught.value.code == "too_large"

    limit(json_bytes=10)
    with pytest.raises(AdapterError) as caught:
        copy_as_safetensors(good("plain-a"), tmp_path / "4")
    assert caught.value.code == "too_large"


def test_several_pickles_and_links_out_of_the_folder(tmp_path: Path) -> None:
    source = as_pickle(good("plain-a"), tmp_path / "in", "a.pt")
    shutil.copy(source / "a.pt", source / "b.pt")
    assert refused(source, tmp_path) == "unexpected_file"
    (source / "b.pt").unlink()
    shutil.move(source / "a.pt", tmp_path / "a.pt")
    (source / "a.pt").symlink_to(tmp_path / "a.pt")
    assert refused(source, tmp_path) == "path_not_allowed"
    assert refused(tmp_path / "nowhere", tmp_path) == "not_found"


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    source = shutil.copytree(good("plain-a"), tmp_path / "in")
    (source / "adapter_model.bin").write_bytes(b"never read")
    code, found = run("convert", source, tmp_path / "out", "--allow-pickle")
    assert (code, found["pickles"]) == (0, [])
