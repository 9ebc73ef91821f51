"""The store: made once, by one of many, whole or not at all, and never above its limit."""

import json
import multiprocessing
import os
import time

import pytest
import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, load_factors, save_peft
from vllm_lora_ext.merging.recipes import LOCK, Store, parse_recipe
from vllm_lora_ext.merging.recipes import store as module

NAME = "model.layers.0.mlp.up_proj"
LIMIT = 1 << 30


@pytest.fixture
def home(tmp_path):
    for seed, name in enumerate(("math", "code")):
        write(tmp_path / name, seed)
    return tmp_path


def write(folder, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 32, generator=draw), torch.randn(24, 4, generator=draw)
    save_peft(Factors({NAME: Pair(a, b)}), folder)


def recipe(weight=0.5):
    models = [
        {"model": "math", "parameters": {"weight": weight}}, {"model": "code"},
    ]  # fmt: skip
    return parse_recipe({"version": 1, "merge_method": "cat", "models": models})


def build(home, weight=0.5, limit=LIMIT, **how):
    return Store(home / "store", limit).get_or_build(recipe(weight), lambda n: home / n, **how)


def stored(home):
    return sorted(p.name for p in (home / "store").iterdir() if p.name != ".locks")


def test_made_once(home, monkeypatch):
    first = build(home)
    monkeypatch.setattr(module, "write_recipe", None)  # nobody may merge again
    second = build(home)
    assert second == first and stored(home) == [first.path.name]
    assert first.rank == load_factors(first.path).rank == 8


def test_another_file_recipe_dtype_or_limit_is_another_adapter(home):
    paths = {build(home).path, build(home, 0.25).path, build(home, dtype=torch.bfloat16).path}
    paths.add(build(home, max_rank=64).path)
    for file in (home / "math").iterdir():
        file.unlink()
    (home / "math").rmdir()
    write(home / "math", 5)
    paths.add(build(home).path)
    assert len(paths) == 5


def test_the_one_not_used_for_longest_goes(home):
    first, second = build(home, 1.0), build(home, 2.0)
    size = sum(f.stat().st_size for f in first.path.iterdir())
    for seconds, built in enumerate((first, second)):
        os.utime(built.path / LOCK, (seconds, seconds))
    assert build(home, 1.0) == first  # used again
    third = build(home, 3.0, limit=int(size * 2.5))
    assert stored(home) == sorted([first.path.name, third.path.name])
    assert not second.path.exists()


def test_what_does_not_fit_is_refused_and_leaves_nothing(home):
    with pytest.raises(AdapterError) as error:
        build(home, limit=100)
    assert error.value.code == "too_large" and stored(home) == []


@pytest.mark.parametrize("broken", ["{", "{}", '{"rank": 8, "report": 3}'])
def test_a_broken_entry_is_made_again(home, broken):
    built = build(home)
    (built.path / LOCK).write_text(broken)
    assert build(home) == built
    assert json.loads((built.path / LOCK).read_text())["rank"] == 8


def test_a_failed_or_cancelled_merge_leaves_nothing(home):
    with pytest.raises(AdapterError) as error:
        build(home, max_rank=7)
    assert error.value.code == "rank_too_large"
    with pytest.raises(AdapterError) as error:
        build(home, cancel=lambda: True)
    assert error.value.code == "cancelled"
    assert stored(home) == []


def _die(home):
    module.write_recipe.__globals__["save_peft"] = _half
    build(home)


def _half(factors, out, *args, **kwargs):
    part = out.parent / f".{out.name}.half"
    part.mkdir()
    (part / "adapter_model.safetensors").write_bytes(b"half")
    os._exit(9)


def test_a_process_that_ends_in_the_middle(home):
    child = multiprocessing.get_context("fork").Process(target=_die, args=(home,))
    child.start()
    child.join()
    assert child.exitcode == 9 and stored(home)[0].endswith(".half")
    built = build(home)
    assert stored(home) == [built.path.name]


def _die_renamed(home):
    real = os.rename

    def last(*args, **kwargs):
        real(*args, **kwargs)
        os._exit(9)

    os.rename = os.replace = last
    build(home)


def test_a_process_that_ends_between_its_rename_and_its_broom(home):
    child = multiprocessing.get_context("fork").Process(target=_die_renamed, args=(home,))
    child.start()
    child.join()
    assert child.exitcode == 9 and len(stored(home)) == 2
    built = build(home)
    assert stored(home) == [built.path.name]


def _build_many(home):
    for i in range(200):
        build(home, 1 + i / 8, limit=80_000)


def test_processes_that_are_killed_at_any_moment(home):
    """SIGKILL while they merge, write, rename, make room: what is found afterwards is whole, and
    nothing of theirs stays."""
    context = multiprocessing.get_context("fork")
    for i in range(25):
        child = context.Process(target=_build_many, args=(home,))
        child.start()
        time.sleep(0.02 + 0.013 * i)
        child.kill()
        child.join()
        built = build(home, 1 + i / 8)
        merged = load_factors(built.path).modules[NAME]
        wanted = sum(
            weight * load_factors(home / name).modules[NAME].delta()
            for name, weight in (("math", 1 + i / 8), ("code", 1.0))
        )
        assert torch.allclose(merged.delta(), wanted, atol=1e-5)
        assert not [name for name in stored(home) if built.path.name in name[1:]]
    build(home, 0.01)
    assert not [name for name in stored(home) if name.startswith(".")]


def _count(home, queue):
    real = module.write_recipe

    def counted(*args, **kwargs):
        time.sleep(0.3)
        queue.put("merged")
        return real(*args, **kwargs)

    module.write_recipe = counted
    built = build(home)
    queue.put(str(built.path))


def test_processes_that_ask_at_once_merge_once(home):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_count, args=(home, queue)) for _ in range(4)]
    for child in children:
        child.start()
    said = [queue.get(timeout=60) for _ in range(5)]
    for child in children:
        child.join()
    assert said.count("merged") == 1 and len(set(said)) == 2


def test_an_input_that_changes_meanwhile(home):
    def touch(*_):
        os.utime(home / "math" / "adapter_model.safetensors", ns=(1, 1))

    with pytest.raises(AdapterError, match="changed") as error:
        build(home, progress=touch)
    assert error.value.code == "files_changed" and stored(home) == []
