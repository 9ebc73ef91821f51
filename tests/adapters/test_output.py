"""Folders appear whole or not at all, whoever writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lora_ext.adapters import output
from vllm_lora_ext.adapters.output import check_place, fill, new_folder
from vllm_lora_ext.errors import AdapterError


def earlier(place: Path) -> bool:
    return (place / "old").is_file()


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_a_new_or_empty_place_is_filled(there: bool, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    if there:
        place.mkdir(parents=True)
    with new_folder(place) as made:
        (made / "sub").mkdir()
        (made / "sub" / "file").write_text("x")
        assert not place.exists() or not any(place.iterdir())
    assert contents(tmp_path) == {"deep/out/sub/file": b"x"}
    assert os.listdir(place.parent) == ["out"]


@pytest.mark.parametrize("aside", [False, True])
def test_what_may_be_replaced_is_and_nothing_else(aside: bool, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "old").write_text("mine to replace")
    with new_folder(place, earlier, aside) as made:
        (made / "new").write_text("1")
    assert contents(tmp_path) == {"out/new": b"1"}
    if not aside:
        with pytest.raises(AdapterError, match="holds something") as caught, new_folder(place):
            raise AssertionError
        assert caught.value.code == "output_exists"
        assert contents(tmp_path) == {"out/new": b"1"}
        return
    for number in ("", "2"):
        with new_folder(place, earlier, aside) as made:
            (made / "newer").write_text(number)
        assert (tmp_path / f"out.old{number}").is_dir()
    assert sorted(os.listdir(tmp_path)) == ["out", "out.old", "out.old2"]


def test_a_file_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "link", "nowhere"):
        with pytest.raises(AdapterError) as caught:
            check_place(tmp_path / name, aside=True)
        assert caught.value.code == "output_exists"


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, AdapterError])
def test_a_block_that_fails_changes_nothing(error: Any, there: bool, tmp_path: Path) -> None:
    place = tmp_path / "out"
    if there:
        place.mkdir()
        (place / "old").write_text("stays")
    before = contents(tmp_path)
    raised = error("no_luck", "stop") if error is AdapterError else error("stop")
    with (
        pytest.raises((AdapterError, KeyboardInterrupt)) as caught,
        new_folder(place, earlier) as made,
    ):
        (made / "half").write_text("x")
        raise raised
    if error is OSError:
        assert caught.value.code == "output_failed" and "stop" in caught.value.text
    else:
        assert caught.value is raised
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if there else [])


@pytest.mark.parametrize("aside", [False, True])
def test_a_rename_that_fails_puts_the_old_folder_back(
    aside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / ("theirs" if aside else "old")).write_text("stays")
    before, real = contents(tmp_path), os.rename
    monkeypatch.setattr(
        output.os, "rename", lambda a, b: no_space() if Path(a).name == "new" else real(a, b)
    )
    with (
        pytest.raises(AdapterError, match="No space") as caught,
        new_folder(place, earlier, aside) as made,
    ):
        (made / "new").write_text("1")
    assert caught.value.code == "output_failed"
    assert contents(tmp_path) == before


def test_files_of_an_adapter_can_be_read_by_others(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out") as made:
            fill(made, {"a": torch.ones(2)}, {"adapter_config.json": "{}", "lock.json": b"[]"})
    finally:
        os.umask(mask)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()} == {"0o640"}
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o750"


def test_a_full_disk_is_no_safetensors_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught, new_folder(tmp_path / "out") as made:
        fill(made / "no such folder", {"a": torch.ones(2)}, {})
    assert caught.value.code == "output_failed"
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """By the operating system's own limit, in a process of its own: nothing is left of it."""
    program = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from vllm_lora_ext.adapters.output import fill, new_folder\n"
        "from vllm_lora_ext.errors import AdapterError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n"
        "    with new_folder(Path(sys.argv[1])) as made:\n"
        "        fill(made, {'a': torch.ones(1 << 15)}, {'adapter_config.json': '{}'})\n"
        "except AdapterError as error:\n"
        "    sys.exit(0 if error.code == 'output_failed' else str(error))\n"
        "sys.exit('it was written')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []
