"""`convert`, `inspect --set` and `systems` as a user runs them; pickles, refusals, overwriting."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_lora_ext import convert as convert_module
from vllm_lora_ext import unpickle
from vllm_lora_ext.adapters import Limits, load_adapter, write_native
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.native import fill_native
from vllm_lora_ext.cli import app
from vllm_lora_ext.convert import RECORD, convert, differing
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.summary import adapter_bytes, slot_bytes, summarise
from vllm_lora_ext.unpickle import copy_as_safetensors

ROUTED = FIXTURES / "routed"
NAMES = sorted(path.parent.name for path in ROUTED.glob("*/adapter"))


def good(name: str) -> Path:
    return ROUTED / name / "adapter"


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


def usage_error(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2
    return " ".join(done.output.replace("│", " ").split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nothing_else(folder: Path, *names: str) -> None:
    assert sorted(os.listdir(folder)) == sorted(names)


@pytest.mark.parametrize("name", NAMES)
def test_every_system_keeps_every_bit(name: str, tmp_path: Path) -> None:
    code, found = run("convert", good(name), tmp_path / "out")
    assert (code, found["ok"], found["rounding"], found["pickles"]) == (0, True, 0.0, [])
    one, two = load_adapter(good(name)), load_adapter(tmp_path / "out")
    assert differing(one, two) == []
    assert (found["system"], found["digest"]) == (one.system, one.digest)
    assert found["out_digest"] == two.digest
    assert found["layers"] + found["blocks"] == len(one.modules) + len(one.blocks)
    nothing_else(tmp_path, "out")


@pytest.mark.parametrize("name", ["loramoe-a", "mixlora-a"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_rounds_a_and_b_only(name: str, dtype: str, tmp_path: Path) -> None:
    code, found = run("convert", good(name), tmp_path / "out", "--dtype", dtype)
    assert code == 0
    one, two = load_adapter(good(name)), load_adapter(tmp_path / "out")
    changed = differing(one, two)
    assert changed and all(tensor.endswith((".a_RK", ".b_NR")) for tensor in changed)
    assert 0 < found["rounding"] < 0.01
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kinds = {key.endswith("router.weight"): t.dtype for key, t in stored.items()}
    assert kinds == {True: torch.float32, False: getattr(torch, dtype)}


def test_a_value_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    adapter = load_adapter(good("plain-a"))
    module = next(iter(adapter.modules.values()))
    module.b_NR[0, 0] = 1e6
    write_native(adapter, tmp_path / "in")
    code, found = run("convert", tmp_path / "in", tmp_path / "out", "--dtype", "float16")
    assert (code, found["error"]["code"]) == (1, "overflow")
    nothing_else(tmp_path, "in")


# --set


@pytest.fixture
def bare_meteora(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """MeteoRA as its authors leave it: the settings stand in no file."""
    folder = shutil.copytree(good("meteora-a"), tmp_path / "bare")
    settings = json.loads((folder / "routing.json").read_text())
    (folder / "routing.json").unlink()
    return folder, settings


def as_options(settings: dict[str, Any]) -> list[str]:
    return [
        word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]


def test_settings_complete_a_folder(bare_meteora: Any, tmp_path: Path) -> None:
    folder, settings = bare_meteora
    code, found = run("convert", folder, tmp_path / "out", *as_options(settings))
    assert (code, found["settings"]) == (0, settings)
    assert differing(load_adapter(good("meteora-a")), load_adapter(tmp_path / "out")) == []
    code, found = run("inspect", folder, *as_options(settings))
    assert (code, found["system"]) == (0, "meteora")
    assert set(found["settings"]) >= {"top_k", "temperature", "expert_order"}


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_missing_setting_is_named_with_its_option(
    command: str, bare_meteora: Any, tmp_path: Path
) -> None:
    folder, settings = bare_meteora
    out = [tmp_path / "out"] if command == "convert" else []
    for gone in ("top_k", "temperature", "expert_order"):
        given = {key: value for key, value in settings.items() if key != gone}
        code, found = run(command, folder, *out, *as_options(given))
        assert (code, found["error"]["code"]) == (1, "missing_setting")
        assert f"--set {gone}=VALUE" in found["error"]["message"]
        assert "routing.json" in found["error"]["message"]
    nothing_else(tmp_path, "bare")


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("top_k=NaN", "bad_gate"), ("top_k=two", "bad_gate"), ("top_k=99", "k_too_large"),
        ("colour=blue", "unknown_key"), ("expert_order=task_0", "bad_value"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(
    given: str, code: str, bare_meteora: Any, tmp_path: Path
) -> None:
    folder, settings = bare_meteora
    settings.pop(given.split("=")[0], None)
    status, found = run("inspect", folder, *as_options(settings), "--set", given)
    assert (status, found["error"]["code"]) == (1, code)


def test_a_setting_against_routing_json() -> None:
    code, found = run("inspect", good("meteora-a"), "--set", "top_k=1")
    assert (code, found["error"]["code"]) == (1, "setting_mismatch")


def test_wrong_usage_of_set(tmp_path: Path) -> None:
    folder = good("plain-a")
    assert "not KEY=VALUE" in usage_error("inspect", folder, "--set", "k")
    assert "not KEY=VALUE" in usage_error("inspect", folder, "--set", "=2")
    assert "set twice" in usage_error("inspect", folder, "--set", "k=1", "--set", "k=2")
    assert "float8" in usage_error("convert", folder, tmp_path / "out", "--dtype", "float8")
    nothing_else(tmp_path)


# Where the result goes


def test_an_earlier_conversion_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("loramoe-a", "plain-a"):
        assert run("convert", good(name), out)[0] == 0
    assert load_adapter(out).system == "plain"
    assert json.loads((out / RECORD).read_text())["system"] == "plain"
    nothing_else(out, RECORD, "adapter_config.json", "adapter_model.safetensors")
    nothing_else(tmp_path, "out")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "deep" / "out").mkdir(parents=True)
    assert run("convert", good("plain-a"), tmp_path / "deep" / "out")[0] == 0
    assert load_adapter(tmp_path / "deep" / "out").system == "plain"


def add_file(out: Path) -> None:
    convert(good("plain-a"), out)
    (out / "README.md").write_text("mine")


def native_by_hand(out: Path) -> None:
    write_native(load_adapter(good("plain-a")), out)


def other_things(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years")


@pytest.mark.parametrize("fill", [add_file, native_by_hand, other_things])
def test_other_things_are_refused_and_force_puts_them_aside(fill: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out)
    before = contents(out)
    code, found = run("convert", good("loramoe-a"), out)
    assert (code, found["error"]["code"]) == (1, "output_exists")
    assert contents(out) == before
    code, _ = run("convert", good("loramoe-a"), out, "--force")
    assert (code, load_adapter(out).system) == (0, "loramoe")
    assert contents(tmp_path / "out.old") == before
    (out / "more").write_text("mine")
    assert run("convert", good("loramoe-a"), out, "--force")[0] == 0
    nothing_else(tmp_path, "out", "out.old", "out.old2")


def test_a_file_and_the_source_itself_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    source = shutil.copytree(good("plain-a"), tmp_path / "a" / "source")
    before = contents(tmp_path)
    for out in (tmp_path / "file", source, source / "native", tmp_path / "a"):
        code, found = run("convert", source, out, "--force")
        assert (code, found["error"]["code"]) == (1, "output_exists")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("step", ["fill_native", "differing", "write_record"])
def test_a_failure_leaves_everything_as_it_was(
    step: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        convert(good("loramoe-a"), tmp_path / "out")
    before = contents(tmp_path)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, step, broken)
    with pytest.raises(AdapterError, match="No space left") as caught:
        convert(good("plain-a"), tmp_path / "out")
    assert caught.value.code == "output_failed"
    assert contents(tmp_path) == before


def test_a_copy_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path, adapter: RoutedAdapter, dtype: Any) -> None:
        next(iter(adapter.modules.values())).a_RK[0, 0] += 1.0
        fill_native(folder, adapter, dtype)
        next(iter(adapter.modules.values())).a_RK[0, 0] -= 1.0

    monkeypatch.setattr(convert_module, "fill_native", wrong)
    with pytest.raises(AdapterError) as caught:
        convert(good("plain-a"), tmp_path / "out")
    assert caught.value.code == "output_failed"
    nothing_else(tmp_path)


def test_what_was_written_can_be_read_by_others(tmp_path: Path) -> None:
    convert(good("plain-a"), tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


# --allow-pickle


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


# What stands beside a folder

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def hira(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """An adapter of full rank, its base model, and the delta."""
    random = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(s, generator=random) for s in ((12, 8), (2, 8), (12, 2)))
    base, folder = tmp_path / "base", tmp_path / "hira"
    base.mkdir()
    folder.mkdir()
    save_file({f"{LAYER}.weight": weight}, base / "model.safetensors")
    names = {f"base_model.model.{LAYER}.hira_A": a, f"base_model.model.{LAYER}.hira_B": b}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2}))
    return folder, base, weight * (b @ a)


def delta(folder: Path) -> torch.Tensor:
    module = load_adapter(folder).modules[LAYER]
    return module.b_NR @ module.a_RK


def test_one_door_for_formats_that_need_more(hira: Any, tmp_path: Path) -> None:
    folder, base, want = hira
    code, found = run("convert", folder, tmp_path / "none")
    assert (code, found["error"]["code"]) == (1, "unsupported_feature")
    assert "--base BASE --rank RANK" in found["error"]["message"]
    code, found = run("convert", folder, tmp_path / "half", "--base", base)
    assert (code, found["error"]["code"]) == (1, "missing_setting")
    code, found = run("convert", folder, tmp_path / "whole", "--base", base, "--rank", 8)
    assert (code, found["system"], found["errors"]) == (0, "hira", {})
    torch.testing.assert_close(delta(tmp_path / "whole"), want)
    code, found = run("convert", folder, tmp_path / "some", "--base", base, "--rank", 3)
    off = float((delta(tmp_path / "some") - want).norm() / want.norm())
    assert code == 0 and 0.01 < off == pytest.approx(found["errors"][LAYER], rel=1e-4)
    assert (found["beside"], found["rank"]) == ({"base": str(base), "rank": "3"}, 3)
    done = CliRunner().invoke(
        app, ["convert", str(folder), str(tmp_path / "said"), f"--base={base}", "--rank=3"]
    )
    assert "an approximation" in done.stdout and LAYER in done.stdout
    nothing_else(tmp_path, "base", "hira", "said", "some", "whole")


def test_a_rank_cuts_what_is_served_as_it_is(tmp_path: Path) -> None:
    code, found = run("convert", good("plain-a"), tmp_path / "cut", "--rank", 2)
    assert (code, found["system"], found["rank"]) == (0, "plain", 2)
    assert min(found["errors"].values()) > 0
    assert "rank" in usage_error("convert", good("plain-a"), tmp_path / "no", "--rank", 0)


def test_gates_do_not_become_an_ordinary_lora(tmp_path: Path) -> None:
    code, found = run("convert", good("loramoe-a"), tmp_path / "out", "--rank", 2)
    assert (code, found["error"]["code"]) == (1, "unsupported_feature")
    nothing_else(tmp_path)


# inspect and systems


def test_systems() -> None:
    code, rows = run("systems")
    assert code == 0
    by_name = {row["name"]: row for row in rows}
    assert by_name["loramoe"]["status"] == "served" and not by_name["loramoe"]["reason"]
    assert by_name["lily"]["status"] == "refused" and by_name["lily"]["reason"]
    assert by_name["hira"]["status"] == "convert" and by_name["hira"]["needs"] == ["base", "rank"]
    plain = CliRunner().invoke(app, ["systems"])
    assert plain.exit_code == 0 and "LoRAMoE" in plain.stdout
    assert "lily is refused" in plain.stdout


def test_inspect_says_why_a_known_system_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LILY"}))
    names = [f"base_model.model.model.layers.0.mlp.up_proj.lily_{p}.weight" for p in
             ("A", "B", "router")]  # fmt: skip
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    code, found = run("inspect", tmp_path)
    assert code == 1
    assert found["system"]["name"] == "lily"
    assert found["system"]["reason"][:30] in found["error"]["message"]
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 1 and "Lily" in done.output


@pytest.mark.parametrize("name", NAMES)
def test_inspect_counts_what_is_there(name: str) -> None:
    code, found = run("inspect", good(name))
    adapter = load_adapter(good(name))
    assert code == 0
    assert sum(group["layers"] for group in found["modules"]) == len(adapter.modules)
    assert sum(group["layers"] for group in found["blocks"]) == len(adapter.blocks)
    assert found["paper"] and found["title"] and found["format"]
    assert 0 < found["adapter_mib"] <= found["slot_mib"]
    assert CliRunner().invoke(app, ["inspect", str(good(name))]).exit_code == 0


def test_memory_counts_blocks_and_a_shared_a_once() -> None:
    router = GateSpec(source="router", blocks=(2, 2, 2), score="softmax")
    shared = RoutedModule(torch.ones(2, 10), torch.ones(7, 6), router, torch.ones(3, 10))
    parts = {"up_proj": LowRank(torch.ones(6, 10), torch.ones(14, 6)),
             "down_proj": LowRank(torch.ones(6, 14), torch.ones(10, 6))}  # fmt: skip
    block = MixBlock(router, torch.ones(3, 10), parts)
    one = RoutedAdapter({"m.up": shared}, "x")
    both = RoutedAdapter({"m.up": shared}, "x", blocks={"model.layers.0.mlp": block})
    assert adapter_bytes(one) == 2 * (2 * 10 + 7 * 6) + 4 * 3 * 10
    assert adapter_bytes(both) - adapter_bytes(one) == 4 * 3 * 10 + 2 * 2 * (6 * 10 + 6 * 14)
    assert slot_bytes(one, 8, on_cpu=True) == 4 * ((8 + 3) * 10 + 8 * 7)
    sizes = ((10, (14, 14)), (14, (10,)))  # vLLM fuses up_proj with gate_proj
    sites = [Site(1, k, n, 8, 4, torch.bfloat16, "cpu") for k, n in sizes]
    sites[0].reserve_routers(3)
    more = sum(t.nbytes for s in sites for t in (s.a_SRK, s.router_SGK, *s.bt_SRN))
    assert slot_bytes(both, 8, True) - slot_bytes(one, 8, True) == more
    found = summarise(both)
    assert (found["rank"], found["router_rows"]) == (6, 3)
    (group,) = found["blocks"]
    assert (group["experts"], group["ranks"], group["layers"]) == (3, [2], 1)
    assert found["modules"][0]["shared_a"]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_memory_of_a_slot_is_what_is_allocated(on_cpu: bool) -> None:
    """Linears have buffers of ours; the embedding and the output matrix those of vLLM."""
    plain, wide = GateSpec(), GateSpec(source="router", blocks=(1,) * 20)
    modules = {
        "model.layers.0.up": RoutedModule(
            torch.ones(20, 3000), torch.ones(2000, 20), wide, torch.ones(20, 3000)
        ),
        "lm_head": RoutedModule(torch.ones(4, 3000), torch.ones(5000, 4), plain),
        "model.embed_tokens": RoutedModule(
            torch.ones(4, 5000), torch.ones(3000, 4), plain, kind="embedding"
        ),
    }
    found = summarise(RoutedAdapter(modules, "x"))
    assert "--max-lora-rank 32" in found["flags"]
    backend = choice.without_triton("cpu") if on_cpu else choice.triton()
    site = Site(1, 3000, (2000,), 32, 32, torch.bfloat16, "cpu", backend)
    site.reserve_routers(20)
    ours = [site.a_SRK, site.router_SGK, *site.bt_SRN]
    if not on_cpu:
        ours += [site.store.tables.ints_SI, site.store.tables.floats_SF]
    theirs = 2 * 2 * 32 * (5000 + 3000)
    seen = found["slot_mib_cpu" if on_cpu else "slot_mib"]
    assert seen == round((sum(t.nbytes for t in ours) + theirs) / 2**20, 2)


def test_memory_of_fused_layers() -> None:
    """By the sizes of their slices, where an adapter does not have them all."""

    def slot(**out: int) -> int:
        modules = {
            f"a.{name}_proj": RoutedModule(
                torch.ones(2, 12 if name == "o" else 10), torch.ones(n, 2)
            )
            for name, n in out.items()
        }
        return slot_bytes(RoutedAdapter(modules, "plain"), 8, on_cpu=True)

    def sites(*layers: tuple[int, tuple[int, ...]]) -> int:
        return sum(4 * 8 * (len(sizes) * width + sum(sizes)) for width, sizes in layers)

    output = (12, (10,))
    assert slot(q=12, k=6, v=6) == slot(q=12, v=6) == slot(q=12, k=6) == sites((10, (12, 6, 6)))
    assert slot(v=6, o=10) == sites((10, (12, 6, 6)), output)
    assert slot(q=12) == sites((10, (12, 12, 12)))
    assert slot(gate=20) == slot(up=20) == slot(gate=20, up=20) == sites((10, (20, 20)))
    assert slot(down=20) == sites((10, (20,)))


@pytest.mark.parametrize("command", ["systems", "inspect", "convert", "verify"])
def test_help_teaches_and_documents_exit_codes(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    text = " ".join(done.stdout.replace("│", " ").split())
    assert done.exit_code == 0
    assert "Example" in text and f"vllm-lora-ext {command}" in text
    assert "Exit code 0" in text
