"""`reward` and `convert` of a reward model as a user runs them, up to the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file
from typer.testing import CliRunner

import vllm_lora_ext
from vllm_lora_ext.adapters.dmoerm import read_reward_model
from vllm_lora_ext.cli import app
from vllm_lora_ext.reward import RewardModel

FOLDER = FIXTURES / "conditioned" / "dmoerm-a" / "adapter"
BASE = FIXTURES / "bases" / "base_llama_tiny"


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """As the authors' program leaves it: pickles, other phases beside them, no settings."""
    folder = tmp_path / "authors"
    for file in FOLDER.rglob("*.safetensors"):
        place = folder / file.relative_to(FOLDER).with_suffix(".pth")
        place.parent.mkdir(parents=True)
        torch.save(load_file(file), place)
    shutil.copy(folder / "router/best_router.pth", folder / "innermoe/chat/ckpts/phase1.pth")
    return folder


def options() -> list[str]:
    said = json.loads((FOLDER / "routing.json").read_text())
    return [w for key, value in said.items() for w in ("--set", f"{key}={json.dumps(value)}")]


def test_pickles_become_safetensors(pickled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, found = run("convert", pickled, out, "--allow-pickle", *options())
    assert (code, found["ok"], found["system"]) == (0, True, "dmoerm"), found
    assert sorted(found["pickles"]) == [
        "innermoe/chat/ckpts/phase3.pth", "innermoe/subj_qa/ckpts/phase3.pth",
        "router/best_router.pth",
    ]  # fmt: skip
    assert (found["rank"], found["rounding"]) == (4, 0.0)
    tensors = 0
    for file in FOLDER.rglob("*.safetensors"):
        one, two = load_file(file), load_file(out / file.relative_to(FOLDER))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        tensors += len(one)
    assert found["tensors"] == tensors
    assert read_reward_model(out).digest == read_reward_model(FOLDER).digest == found["digest"]
    assert not list(out.rglob("*.pth"))
    # A second time it may be replaced, and from safetensors it goes without pickles.
    assert run("convert", pickled, out, "--allow-pickle", *options())[0] == 0
    code, found = run("convert", out, tmp_path / "again")
    assert (code, found["pickles"]) == (0, [])


def test_settings_do_not_reach_into_the_source(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    said = json.loads((folder / "routing.json").read_text())
    alpha = said.pop("lora_alpha")
    (folder / "routing.json").write_text(json.dumps(said))
    before = (folder / "routing.json").read_bytes()
    code, _ = run("convert", folder, tmp_path / "out", "--set", f"lora_alpha={alpha}")
    assert code == 0
    assert (folder / "routing.json").read_bytes() == before
    assert read_reward_model(tmp_path / "out").digest == read_reward_model(FOLDER).digest


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ([], "pickle_refused"),
        (["--allow-pickle", "--set", "lora_alpha=4"], "missing_setting"),
        (["--allow-pickle", "--dtype", "bfloat16"], "unsupported_feature"),
    ],
)
def test_conversions_that_are_refused(
    pickled: Path, tmp_path: Path, more: list[str], code: str
) -> None:
    exit_code, found = run("convert", pickled, tmp_path / "out", *more)
    assert (exit_code, found["error"]["code"]) == (1, code)
    assert not (tmp_path / "out").exists()


class Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value_head = torch.nn.Linear(2, 2)


def test_a_router_that_is_a_whole_module_is_refused(pickled: Path, tmp_path: Path) -> None:
    torch.save(Whole(), pickled / "router/best_router.pth")
    code, found = run("convert", pickled, tmp_path / "out", "--allow-pickle", *options())
    assert (code, found["error"]["code"]) == (1, "pickle_refused")
    assert "state_dict()" in found["error"]["message"]


def texts(tmp_path: Path, *lines: object) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def test_several_bases_are_refused_plainly(tmp_path: Path) -> None:
    file = texts(tmp_path, {"router_ids": [5], "inner_ids": [5]})
    done = CliRunner().invoke(
        app, ["reward", str(FOLDER), "--base", "a", "--base", "b", "--input", str(file)]
    )
    assert done.exit_code == 1
    assert "one engine" in done.stderr and "unsupported_feature" in done.stderr
    with pytest.raises(vllm_lora_ext.AdapterError, match="one engine"):
        RewardModel(FOLDER, {"chat": "a", "text": "b"})


@pytest.mark.parametrize(
    ("text", "words"), [("", "no line"), ("{}\n{", "line 2"), (None, "texts.jsonl")]
)
def test_input_that_is_no_json_lines(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "texts.jsonl"
    if text is not None:
        file.write_text(text)
    done = CliRunner().invoke(
        app, ["reward", str(FOLDER), "--base", str(BASE), "--input", str(file)],
        env={"COLUMNS": "400"},
    )  # fmt: skip
    assert done.exit_code == 2
    assert words in done.output


def test_it_is_offered_at_the_top() -> None:
    assert vllm_lora_ext.RewardModel is RewardModel
    with pytest.raises(AttributeError):
        vllm_lora_ext.NoSuchThing  # noqa: B018
