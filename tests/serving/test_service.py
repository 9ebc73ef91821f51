"""The life of a mix: made once, held while used, gone without a trace; in a pretended server."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving import Mixes, parse
from vllm_lora_ext.serving.sources import Sources
from vllm_lora_ext.settings import LoraExtSettings, MergeSettings


class Request:
    """Something that can be held."""


class Host:
    max_rank, dtype = 16, "float32"

    def __init__(self) -> None:
        self.known = {name: (f"/adapters/{name}", "v1") for name in "abcd"}
        self.shown: dict[str, object] = {}
        self.loads: list[str] = []
        self.forgotten: list[object] = []
        self.refuse = False
        self.asked_in: set[int] = set()

    def adapters(self) -> dict[str, tuple[str, str]]:
        self.asked_in.add(threading.get_ident())
        return self.known

    def folder(self, path: str) -> Path:
        return Path(path)

    async def load(self, name: str, path: Path) -> object:
        await asyncio.sleep(0)
        if self.refuse:
            raise AdapterError("shape_mismatch", "refused", seen=f"{path}/x")
        assert (path / "weights").is_file()
        self.loads.append(name)
        return (name, path)

    def show(self, model: str, loaded: object) -> None:
        self.shown[model] = loaded

    async def forget(self, loaded: object) -> None:
        self.forgotten.append(loaded)

    def hide(self, model: str) -> None:
        self.shown.pop(model, None)


class Builder:
    """In place of the merging process."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail = False

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        self.jobs.append(job)
        await self.gate.wait()
        if self.fail:
            raise AdapterError("rank_too_large", "too many ranks")
        Path(job["lease"]).mkdir()
        (Path(job["lease"]) / "weights").write_text("x")
        return {"path": job["lease"], "rank": 1}

    async def close(self) -> None:
        return None


class World:
    def __init__(self, folder: Path, **merge: Any) -> None:
        settings = {"store": str(folder), **merge}
        self.host, self.builder = Host(), Builder()
        self.mixes = Mixes(
            LoraExtSettings.from_additional_config({"lora_ext": {"merge": settings}}), self.host
        )
        self.mixes._builder = self.builder  # type: ignore[assignment]

    async def ask(self, name: str, holder: object | None = None) -> str:
        return await self.mixes.serve(parse(name), holder or Request())

    def folders(self, root: Path) -> set[Path]:
        return {path for path in root.glob("served/server-*/*") if path.is_dir()}


def run(test: Any) -> None:
    asyncio.run(test())


async def settled() -> None:
    gc.collect()
    for _ in range(8):
        await asyncio.sleep(0)


def test_concurrent_first_requests_merge_once(tmp_path):
    async def test() -> None:
        world = World(tmp_path)
        world.builder.gate.clear()
        names = ["cat:a*0.6+b*0.4", "cat:b*.4+a*0.60"] * 10
        asked = [asyncio.create_task(world.ask(name)) for name in names]
        await asyncio.sleep(0.05)
        world.builder.gate.set()
        assert set(await asyncio.gather(*asked)) == {"cat:a*0.6+b*0.4"}
        assert len(world.builder.jobs) == 1 and len(world.host.loads) == 1
        assert list(world.host.shown) == ["cat:a*0.6+b*0.4"]
        world.mixes._leases.close()  # as at the process's end
        assert not world.folders(tmp_path)

    run(test)


@pytest.mark.parametrize("where", ["merge", "load"])
def test_a_failure_leaves_nothing_and_can_be_asked_again(tmp_path, where):
    async def test() -> None:
        world = World(tmp_path)
        world.builder.fail, world.host.refuse = where == "merge", where == "load"
        for _ in range(2):
            with pytest.raises(AdapterError) as caught:
                await world.ask("cat:a+b")
            assert str(tmp_path) not in str(caught.value), "a mix has its name, and no folder"
        assert world.host.shown == {} and world.mixes.names() == set()
        assert not world.folders(tmp_path)
        world.builder.fail = world.host.refuse = False
        assert await world.ask("cat:a+b") == "cat:a+b"

    run(test)


def test_a_request_that_goes_away_does_not_end_the_merge_of_others(tmp_path):
    async def test() -> None:
        world = World(tmp_path)
        world.builder.gate.clear()
        first, second = (asyncio.create_task(world.ask("cat:a+b")) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        world.builder.gate.set()
        assert await second == "cat:a+b"
        assert len(world.builder.jobs) == 1

    run(test)


def test_the_least_recently_used_goes_first_and_never_one_in_use(tmp_path):
    async def test() -> None:
        world = World(tmp_path, max_mixes=2)
        keep: Request | None = Request()
        await world.ask("cat:a", keep)
        await world.ask("cat:b")
        await settled()
        await world.ask("cat:c")  # a is older, but in use
        await settled()
        assert set(world.host.shown) == {"cat:a", "cat:c"}
        assert [name for name, _ in world.host.forgotten] == ["cat:b"]
        assert len(world.folders(tmp_path)) == 2
        other = Request()
        await world.ask("cat:c", other)
        with pytest.raises(AdapterError) as caught:
            await world.ask("cat:d")
        assert caught.value.code == "merge_busy"
        keep = None
        await settled()
        assert await world.ask("cat:d") == "cat:d"
        assert set(world.host.shown) == {"cat:c", "cat:d"}
        assert keep is None

    run(test)


def test_another_adapter_behind_a_name_is_another_mix(tmp_path):
    """The old one stays for the request that has it, under a name that is not given twice."""

    async def test() -> None:
        world = World(tmp_path)
        holder: Request | None = Request()
        await world.ask("cat:a+b", holder)
        world.host.known["a"] = ("/adapters/a", "v2")
        await world.ask("cat:a+b")
        assert len(world.builder.jobs) == 2 and len(set(world.host.loads)) == 2
        assert world.host.forgotten == [] and len(world.folders(tmp_path)) == 2
        holder = None
        await settled()
        assert len(world.host.forgotten) == 1 and len(world.folders(tmp_path)) == 1
        assert holder is None
        del world.host.known["a"]
        with pytest.raises(AdapterError) as caught:
            await world.ask("cat:a+b")
        assert caught.value.code == "not_found"

    run(test)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("cat:a+b+c", "mix_limit"), ("cat:a+nosuch", "not_found"), ("recipe:nosuch", "not_found"),
        ('describe:"x"', "not_found"),
    ],
)  # fmt: skip
def test_refusals_start_no_merge(tmp_path, name, code):
    async def test() -> None:
        world = World(tmp_path, max_terms=2)
        with pytest.raises(AdapterError) as caught:
            await world.ask(name)
        assert caught.value.code == code
        assert world.builder.jobs == [] and world.mixes.names() == set()

    run(test)


def test_the_rank_limit_is_the_smaller_of_both(tmp_path):
    async def test() -> None:
        for limit, want in ((None, 16), (4, 4), (99, 16)):
            world = World(tmp_path, max_rank=limit)
            await world.ask("cat:a")
            assert world.builder.jobs[0]["max_rank"] == want

    run(test)


def test_a_recipe_may_name_files(tmp_path):
    """Masks, latents and layouts are files; another content is another mix."""
    (tmp_path / "masks.safetensors").write_bytes(b"one")
    recipe = tmp_path / "drawn.yaml"
    recipe.write_text(
        "version: 1\nmerge_method: dare_linear\nmodels: [{model: a}, {model: b}]\n"
        "masks: masks.safetensors\n"
    )
    sources = Sources(MergeSettings(recipes={"drawn": recipe}), None, Host())
    job = sources.job_of(parse("recipe:drawn"))
    assert job.request()["folders"]["masks.safetensors"] == str(tmp_path / "masks.safetensors")
    (tmp_path / "masks.safetensors").write_bytes(b"another")
    assert sources.job_of(parse("recipe:drawn")).version != job.version
    (tmp_path / "masks.safetensors").unlink()
    with pytest.raises(AdapterError) as refused:
        sources.job_of(parse("recipe:drawn"))
    assert refused.value.code == "not_found"


@pytest.mark.parametrize("roots", [None, ()], ids=["anywhere", "nowhere"])
@pytest.mark.parametrize("path", ["~nosuchuser/x.yaml", "a\0.yaml", "\ud800.yaml", "none.yaml"])
def test_a_path_that_no_recipe_can_have_is_refused(path, roots):
    with pytest.raises(AdapterError) as refused:
        Sources(MergeSettings(), roots, Host()).job_of_file(path, {})
    assert refused.value.code == ("not_found" if roots is None else "path_not_allowed")


@pytest.mark.parametrize("name", ["~nosuchuser/b", "a\\0", "\\ud800", "../b"])
def test_a_recipe_that_names_what_cannot_be_is_refused(tmp_path, name):
    recipe = tmp_path / "odd.yaml"
    models = f'models: [{{model: a}}, {{model: "{name}"}}]'
    recipe.write_text(f"version: 1\nmerge_method: cat\n{models}\n")
    for roots, codes in ((None, {"not_found"}), ([tmp_path], {"not_found", "path_not_allowed"})):
        with pytest.raises(AdapterError) as refused:
            Sources(MergeSettings(), roots, Host()).job_of_file(str(recipe), Host().known)
        assert refused.value.code in codes | {"bad_value"}, refused.value  # no text at all


def test_a_recipe_s_file_is_read_in_a_thread_and_the_server_s_list_is_not(tmp_path):
    async def test() -> None:
        world, recipe = World(tmp_path / "store"), tmp_path / "r.yaml"
        recipe.write_text("version: 1\nmerge_method: cat\nmodels: [{model: a}]\n")
        await world.mixes.build_recipe(str(recipe))
        assert world.host.asked_in == {threading.get_ident()}

    run(test)


def test_a_recipe_that_is_loaded_again_unchanged_takes_no_older_version_s_place(tmp_path):
    """The engine keeps one adapter of a content, from where it was loaded last; what was rolled
    back to is what it lets go last."""

    async def test() -> None:
        world, recipe = World(tmp_path / "store"), tmp_path / "r.yaml"
        recipe.write_text("version: 1\nmerge_method: cat\nmodels: [{model: a}]\n")

        async def load(version: str) -> Path:
            entry = await world.mixes.build_recipe(str(recipe))
            world.mixes.loaded("mine", entry, version)
            await settled()
            return entry.path

        first = await load("v1")
        again = [await load("v2") for _ in range(4)]
        assert world.folders(tmp_path / "store") == {first, again[-1]}
        assert set(world.mixes.made()) == {str(first), str(again[-1])}
        third = await load("v3")
        world.mixes.rolled_back("mine", "v1")
        world.mixes.rolled_back("of no recipe", "v1")
        fourth = await load("v4")
        assert world.folders(tmp_path / "store") == {first, third, fourth}
        world.mixes.unloaded("mine")
        await settled()
        assert not world.folders(tmp_path / "store")

    run(test)


def test_a_disk_that_takes_no_folder_is_one_typed_error(tmp_path, caplog):
    (tmp_path / "store").write_text("a file where the folder should be")
    with pytest.raises(AdapterError) as refused:
        World(tmp_path / "store" / "below")
    assert refused.value.code == "merge_failed"
    assert str(tmp_path) not in str(refused.value) and str(tmp_path) in caplog.text


def test_errors_of_recipes_name_no_place_of_the_server(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nmerge_method: cat\nmodels: [{model: a}, {model: none/b}]\n")
    settings = MergeSettings(recipes={"weekly": tmp_path / "gone.yaml"})
    for roots in (None, [tmp_path]):
        sources = Sources(settings, roots, Host())
        known = Host().known
        asked = [partial(sources.job_of_file, p, known) for p in ("r.yaml", "../r.yaml", "~")]
        asked += [partial(sources.job_of, parse("recipe:weekly"))]
        if roots is None:
            asked[0] = partial(sources.job_of_file, os.path.relpath(recipe), known)
        for ask in asked:
            with pytest.raises(AdapterError) as refused:
                ask()
            said = str(refused.value)
            assert str(tmp_path) not in said and str(Path.home()) + ";" not in said, said


def test_an_adapter_s_folder_that_cannot_be_looked_into_is_a_typed_error(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(Path, "iterdir", closed)
    sources = Sources(MergeSettings(adapters={"e": tmp_path / "kept"}), None, Host())
    with pytest.raises(AdapterError) as refused:
        sources.job_of(parse("cat:a+e"))
    assert refused.value.code == "bad_file" and str(tmp_path) not in str(refused.value)
