"""`vllm-lora-ext merge`, as a user types it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vllm_lora_ext.cli import app
from vllm_lora_ext.merging import METHODS, Factors, Pair, load_factors, save_peft

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("math", "code")):
        draw = torch.Generator().manual_seed(seed)
        pair = Pair(torch.randn(4, 32, generator=draw), torch.randn(24, 4, generator=draw))
        save_peft(Factors({NAME: pair}, "org/base"), tmp_path / "adapters" / name)
    return tmp_path


def call(*args):
    return CliRunner().invoke(app, ["merge", *map(str, args)])


PLAIN = ("--adapter", "math=adapters/math:0.6", "--adapter", "code=adapters/code")


def wanted(home):
    one, two = (load_factors(home / "adapters" / n).modules[NAME].delta() for n in ("math", "code"))
    return 0.6 * one + two


def test_plain_arguments(home):
    result = call("--method", "cat", *PLAIN, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "rank 8" in result.output and "--max-lora-rank 8" in result.output
    got = load_factors(home / "out").modules[NAME].delta()
    torch.testing.assert_close(got, wanted(home), rtol=1e-5, atol=1e-5)


def test_a_recipe_and_its_paths(home, monkeypatch):
    (home / "recipes").mkdir()
    (home / "recipes" / "mix.yaml").write_text(
        "version: 1\nmerge_method: svd\nmodels:\n"
        "  - {model: ../adapters/math, parameters: {weight: 0.6}}\n  - model: ../adapters/code\n"
        "output: {rank: 3, dtype: bfloat16}\n"
    )
    result = call(home / "recipes" / "mix.yaml", "--out", home / "out", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["ok"] and said["rank"] == 3 and not said["report"]["exact"]
    kept = said["report"]["modules"][NAME]["kept_energy"]
    got = load_factors(home / "out").modules[NAME].delta()
    lost = float((got - wanted(home)).norm() / wanted(home).norm())
    assert 1 - lost**2 == pytest.approx(kept, abs=0.01)


def test_what_was_lost_is_shown(home):
    result = call("--method", "ties", *PLAIN, "--rank", "2", "--set", "density=0.5", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "energy kept" in result.output and "not exact" in result.output


def test_the_list():
    result = call("--list", "--json")
    assert [row["name"] for row in json.loads(result.stdout)] == list(METHODS)
    assert "lego" in call("--list").output


@pytest.mark.parametrize(
    "args, code",
    [
        (("--method", "tie", *PLAIN), "bad_value"),
        (("--method", "cat", *PLAIN, "--set", "densty=1"), "unknown_key"),
        (("--method", "cat", "--adapter", "a=nowhere"), "not_found"),
        (("--method", "cat", *PLAIN, "--base-model", "org/other"), "setting_mismatch"),
        (("none.yaml",), "not_found"),
    ],
)
def test_refusals(home, args, code):
    result = call(*args, "--out", "out", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == code
    assert not (home / "out").exists()


def test_a_folder_that_holds_something(home):
    (home / "out").mkdir()
    (home / "out" / "mine").write_text("x")
    result = call("--method", "cat", *PLAIN, "--out", "out", "--json")
    assert json.loads(result.stdout)["error"]["code"] == "output_exists"
    assert (home / "out" / "mine").read_text() == "x"


@pytest.mark.parametrize(
    "args", [(), ("--out", "o"), ("r.yaml", "--out", "o", "--method", "cat"), ("r.yaml",)]
)
def test_wrong_usage(args):
    assert call(*args).exit_code == 2
