"""Files that are written to, replaced or removed while they are read.

A typed error, or the whole of one version; never a mixture, and never the end of the process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_adapters import GOOD, weights_file
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.registry import find_reader, read_adapter
from vllm_lora_ext.errors import AdapterError

PLAIN = GOOD["plain-a"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return shutil.copytree(PLAIN, tmp_path / "place")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """An adapter of the same shape and config, with other weights."""
    folder = shutil.copytree(PLAIN, tmp_path / "other")
    doubled = {name: 2 * t for name, t in load_file(weights_file(folder)).items()}
    save_file(doubled, weights_file(folder), metadata={"format": "pt"})
    return folder


def code_of(place: Path, change: Callable[[], object]) -> str:
    """Of a folder that is changed after it was opened, before its tensors are read."""
    folder = AdapterFolder(place)
    find_reader(folder)
    change()
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert "fix: " in caught.value.text
    return caught.value.code


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_weights_that_are_cut_short(place, size):
    """Mapped into memory they would end the process (SIGBUS)."""
    weights = weights_file(place)
    left = weights.stat().st_size - 1 if size < 0 else size
    assert code_of(place, lambda: os.truncate(weights, left)) == "files_changed"


def test_weights_that_are_written_over(place, other):
    change = shutil.copyfile
    assert code_of(place, lambda: change(weights_file(other), weights_file(place))) == (
        "files_changed"
    )


def test_weights_that_are_replaced(place, other):
    def change() -> None:
        os.replace(weights_file(other), weights_file(place))

    assert code_of(place, change) == "files_changed"


def test_a_config_that_is_replaced(place):
    """Read already: beside the weights that come with another one it would be a mixture."""
    config = json.loads((place / CONFIG).read_text())

    def change() -> None:
        (place / CONFIG).write_text(json.dumps(config | {"lora_alpha": 1}))

    assert code_of(place, change) == "files_changed"


def test_a_folder_that_goes(place):
    assert code_of(place, lambda: shutil.rmtree(place)) == "files_changed"


def test_files_of_subfolders(tmp_path):
    folder = shutil.copytree(GOOD["meteora-a"], tmp_path / "place")
    inner = next(folder.glob("*/" + CONFIG))
    opened = AdapterFolder(folder)
    reader = find_reader(opened)
    reader.read(opened)
    inner.write_text(inner.read_text() + " ")
    with pytest.raises(AdapterError) as caught:
        opened.finish()
    assert caught.value.code == "files_changed" and inner.parent.name in caught.value.text


def test_a_second_write_in_one_tick_of_the_clock(place, other):
    """The file's time is the same, and so is its size."""
    weights = weights_file(place)
    shutil.copyfile(weights_file(other), weights)
    folder = AdapterFolder(place)
    find_reader(folder)
    shutil.copyfile(weights_file(PLAIN), weights)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert caught.value.code == "files_changed"


@pytest.mark.parametrize("deep", [False, True])
def test_a_link_that_leads_elsewhere_meanwhile(place, other, tmp_path, deep):
    """A folder by the name of its link, or files by a link to their folder: as versions are put in
    place by one rename."""
    versions, link = (place, other), tmp_path / ("data" if deep else "current")
    link.symlink_to(versions[0])
    folder = link
    if deep:
        folder = tmp_path / "linked"
        folder.mkdir()
        for name in (CONFIG, "adapter_model.safetensors"):
            (folder / name).symlink_to(link / name)

    def change() -> None:
        (tmp_path / "next").symlink_to(versions[1])
        os.replace(tmp_path / "next", link)

    assert code_of(folder, change) == "files_changed"


def test_a_config_of_one_system_beside_weights_of_another(tmp_path):
    """What the reader finds wrong is not the user's mistake."""
    link = tmp_path / "current"
    link.symlink_to(GOOD["loramoe-a"])

    def change() -> None:
        (tmp_path / "next").symlink_to(PLAIN)
        os.replace(tmp_path / "next", link)

    folder = AdapterFolder(link)
    change()
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert caught.value.code == "files_changed"


def test_links_are_judged_by_what_they_lead_to(place, tmp_path):
    weights, store = weights_file(place), tmp_path / "store"
    weights.rename(store)
    weights.symlink_to(store)
    assert load_adapter(place).modules
    assert code_of(place, lambda: os.truncate(store, 9)) == "files_changed"


def test_a_writer_that_does_not_stop(place, other):
    """All kinds of changes at once: what loads is one of the two, whole."""
    versions = {load_adapter(folder).digest for folder in (PLAIN, other)}
    stop, rng = threading.Event(), random.Random(0)

    def write() -> None:
        while not stop.is_set():
            source = rng.choice((PLAIN, other))
            if rng.random() < 0.5:
                shutil.copyfile(weights_file(source), weights_file(place))
            else:
                copied = shutil.copyfile(weights_file(source), place.parent / "copy")
                os.replace(copied, weights_file(place))
            if rng.random() < 0.3:
                stop.wait(0.03)

    writer = threading.Thread(target=write)
    writer.start()
    codes, loaded = set(), 0
    try:
        for _ in range(150):
            try:
                assert load_adapter(place).digest in versions
                loaded += 1
            except AdapterError as error:
                codes.add(error.code)
    finally:
        stop.set()
        writer.join()
    print(f"{loaded} of 150 loaded, others: {sorted(codes)}")
    assert codes <= {"files_changed", "bad_safetensors", "missing_file", "bad_file"}
    assert load_adapter(place).digest in versions


def test_what_is_read_is_what_the_library_reads(tmp_path):
    """Every dtype that is served, empty tensors and scalars."""
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64,
                      torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8)
    } | {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    weights = AdapterFolder(tmp_path)._weights
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float()), name
