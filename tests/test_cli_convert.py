"""`convert` as a user runs it: every bit kept, settings, what is there, one door for formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import NAMES, contents, good, nothing_else, run, usage_error
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_lora_ext import convert as convert_module
from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import fill_native
from vllm_lora_ext.cli import app
from vllm_lora_ext.convert import RECORD, convert, differing
from vllm_lora_ext.errors import AdapterError


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
