"""A mix is made of the versions that it is named for, whatever their folders hold by now."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, load_factors, save_peft
from vllm_lora_ext.serving import build, parse
from vllm_lora_ext.serving.leases import link_folder
from vllm_lora_ext.serving.sources import Job, Sources
from vllm_lora_ext.settings import MergeSettings

NAME = "model.layers.0.mlp.up_proj"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(folder: Path, value: float) -> None:
    """An adapter whose delta is 2 * value everywhere."""
    shutil.rmtree(folder, ignore_errors=True)
    save_peft(Factors({NAME: Pair(torch.ones(2, 4), torch.full((4, 2), value))}), folder)


class World:
    """A server's adapters `a` and `b`, and merges as its merging process makes them."""

    def __init__(self, home: Path) -> None:
        self.home, self.known = home, {}
        for name, value in (("a", 1.0), ("b", 10.0)):
            write(home / name, value)
            self.load(name, home / name)
        self.settings = MergeSettings(recipes={"weekly": home / "weekly.yaml"})
        self.leases = 0

    def load(self, name: str, folder: Path) -> None:
        """As the engine does: from here on the name is this content."""
        self.known[name] = (str(folder), load_adapter(folder).digest)

    def adapters(self) -> dict[str, tuple[str, str]]:
        return self.known

    def folder(self, path: str) -> Path:
        return Path(path)

    def job(self, mix: str = "cat:a+b") -> Job:
        return Sources(self.settings, None, self).job_of(parse(mix))

    def merged(self, job: Job) -> float:
        """A value of the merge's delta."""
        self.leases += 1
        request: dict[str, Any] = {
            **job.request(), "lease": str(self.home / f"lease{self.leases}"),
            "store": str(self.home / "store"), "max_bytes": 1 << 30, "dtype": "float32",
            "max_rank": 16,
        }  # fmt: skip
        path = build.run(request)["path"]
        return float(load_factors(path).modules[NAME].delta()[0, 0])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def refused(world: World, job: Job) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        world.merged(job)
    assert not (world.home / f"lease{world.leases}").exists()
    return caught.value


def test_an_overwritten_folder_is_in_no_mix_until_it_is_loaded(world):
    write(world.home / "a", 5.0)
    error = refused(world, world.job())
    assert error.code == "files_changed" and "adapter a" in error.text
    assert str(world.home) not in str(error)
    world.load("a", world.home / "a")
    assert world.merged(world.job()) == 30.0


def test_a_mix_that_is_made_already_stays_itself(world):
    """As after a rollback onto a folder that holds the next version: the store has the mix of the
    old one, which nothing is read for."""
    before = world.job()
    assert world.merged(before) == 22.0
    write(world.home / "a", 5.0)
    assert world.merged(world.job()) == 22.0 and world.job().version == before.version
    old = world.known["a"]
    world.load("a", world.home / "a")
    assert world.merged(world.job()) == 30.0
    world.known["a"] = old
    assert world.merged(world.job()) == 22.0
    assert refused(world, world.job("cat:a*0.5+b")).code == "files_changed"


@pytest.mark.parametrize(
    "steps",
    [
        "merge_method: cat\nmodels: [{model: a}, {model: b}]\n",
        "merge_method: pipeline\nsteps:\n  - {id: x, op: load, model: a}\n"
        "  - {id: y, op: convert, model: b}\n  - {id: out, op: concat, inputs: [x, y]}\n",
    ],
    ids=["models", "steps"],
)
def test_a_recipe_s_adapters_are_those_that_are_loaded(world, steps):
    (world.home / "weekly.yaml").write_text("version: 1\n" + steps)
    write(world.home / "b", 5.0)
    assert refused(world, world.job("recipe:weekly")).code == "files_changed"
    write(world.home / "b", 10.0)
    assert world.merged(world.job("recipe:weekly")) == 22.0


def test_the_same_content_in_other_files_is_the_same_version(world):
    write(world.home / "a", 1.0)
    (world.home / "a" / "README.md").write_text("not read")
    os.utime(world.home / "b" / FILES[1], (1, 1))
    assert world.merged(world.job()) == 22.0


@pytest.mark.parametrize("how", ["lease", "hub"])
def test_links_are_no_other_version(world, how):
    """A recipe's adapter lies in a lease of hard links, a hub's in links to its blobs."""
    folder = world.home / "models--x" / "snapshots" / "1"
    if how == "lease":
        link_folder(world.home / "a", folder)
    else:
        folder.mkdir(parents=True)
        (folder.parent.parent / "blobs").mkdir()
        for file in FILES:
            shutil.copy(world.home / "a" / file, folder.parent.parent / "blobs" / file)
            (folder / file).symlink_to(Path("..", "..", "blobs", file))
    world.load("a", folder)
    assert world.merged(world.job()) == 22.0


def test_files_that_are_not_loaded_are_what_they_are(world):
    """`merge.adapters` are the operator's: a mix of them is of what stands there."""
    world.settings = MergeSettings(adapters={"c": world.home / "c"})
    for value, want in ((1.0, 22.0), (5.0, 30.0)):
        write(world.home / "c", value)
        assert world.merged(world.job("cat:b+c")) == want


def test_an_adapter_that_is_written_to_while_it_is_merged(world, monkeypatch):
    """Between the look at its version and the reading of its numbers."""
    from vllm_lora_ext.merging.recipes import write as module

    def run_recipe(*args: Any, **how: Any) -> Any:
        write(world.home / "a", 5.0)
        return run(*args, **how)

    run = module.run_recipe
    monkeypatch.setattr(module, "run_recipe", run_recipe)
    assert refused(world, world.job()).code == "files_changed"
