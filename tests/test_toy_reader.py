"""The guide's example package, installed as a user would; and entry points that cannot be used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from make_adapters import BASE_LLAMA

from vllm_lora_ext.adapters import load_adapter, registry
from vllm_lora_ext.errors import AdapterError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "toy_reader"

# The formula of the toy system by itself, next to what the registry makes of the same files.
COMPARE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter

base, folder, k, scale = sys.argv[1], sys.argv[2], 2, 1.5
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
ids = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(1))
tensors = load_file(f"{folder}/adapter_model.safetensors")

def toy(stem):
    def hook(layer, args, out):
        x = args[0]
        p = torch.sigmoid(x @ tensors[f"{stem}.router.weight"].T)
        best = p.topk(k, dim=-1)
        delta = torch.zeros_like(out)
        for e in range(p.shape[-1]):
            mine = ((best.indices == e) * best.values).sum(-1) / best.values.sum(-1)
            low = x @ tensors[f"{stem}.down.{e}.weight"].T
            delta += scale * mine[..., None] * (low @ tensors[f"{stem}.up.{e}.weight"].T)
        return out + delta
    return hook

with torch.inference_mode():
    plain = model(ids).logits
    stems = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    hooks = [model.get_submodule(s).register_forward_hook(toy(f"{s}.toy")) for s in stems]
    want = model(ids).logits
    for h in hooks: h.remove()
    adapter = load_adapter(folder)
    with apply_adapter(model, adapter):
        got = model(ids).logits
    with apply_adapter(model, load_adapter(write_native(adapter, f"{folder}-native"))):
        copy = model(ids).logits
print(adapter.system, float((want - plain).abs().mean()), float((want - got).abs().max()),
      float((got - copy).abs().max()))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A process environment in which the example package is installed."""
    where = tmp_path_factory.mktemp("toy")
    source = shutil.copytree(EXAMPLE, where / "source")  # pip builds inside the folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(where / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    more = {"PYTHONPATH": str(where / "site"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | more


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def adapter(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "toy"
    run(environment, str(EXAMPLE / "make_adapter.py"), str(folder))
    return folder


def test_numbers_are_those_of_the_formula(environment: dict[str, str], adapter: Path) -> None:
    system, effect, error, copy = run(
        environment, "-c", COMPARE, str(BASE_LLAMA), str(adapter)
    ).split()
    assert system == "toy"
    assert float(effect) > 0.05
    assert float(error) < 1e-4
    assert float(copy) == 0.0


def test_the_commands_know_it(environment: dict[str, str], adapter: Path) -> None:
    rows = json.loads(run(environment, "-m", "vllm_lora_ext.cli", "systems", "--json"))
    (toy,) = [row for row in rows if row["name"] == "toy"]
    assert toy["settings"] == {"k": "experts that a token uses"}
    text = run(environment, "-m", "vllm_lora_ext.cli", "inspect", str(adapter), "--json")
    found = json.loads(text)
    assert (found["title"], found["rank"], found["router_rows"]) == ("ToyMoE", 15, 5)


def test_without_the_package_the_format_is_unknown(adapter: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(adapter)
    assert caught.value.code == "unknown_peft_type"


def test_the_guide_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "own_system.md").read_text(encoding="utf-8")
    source = (EXAMPLE / "toy_reader.py").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        assert block in source
    toml = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert toml and all(b in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8") for b in toml)


GOOD = """
import dataclasses
from vllm_lora_ext.adapters.readers import plain
READER = dataclasses.replace(plain.READER, name="{name}", detect=lambda folder: False)
"""


def test_a_good_entry_point_is_last_in_the_table(installed: Any) -> None:
    installed("good_reader_package", GOOD.format(name="other"))
    assert [reader.name for reader in registry.formats()][-1] == "other"


CLAIMS = """
import dataclasses
from vllm_lora_ext.adapters.readers import plain
READER = dataclasses.replace(
    plain.READER, name="mine", general=0, detect=lambda folder: "my_key" in folder.config,
    read=lambda folder: dataclasses.replace(plain.read(folder, also=("my_key",)), system="mine"),
)
"""


def test_a_format_on_top_of_ordinary_lora_is_its_owners(installed: Any, tmp_path: Path) -> None:
    """A folder of plain pairs is plain only as long as nobody else claims it."""
    good = ROOT / "tests" / "fixtures" / "routed" / "plain-a" / "adapter"
    folder = shutil.copytree(good, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "my_key": 3}))
    with pytest.raises(AdapterError, match="my_key"):
        load_adapter(folder)
    installed("claiming_reader_package", CLAIMS)
    assert load_adapter(folder).system == "mine"
    assert load_adapter(good).system == "plain"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('no such device')", "no such device"),
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("READERS = ()", "READER"),
        ("READER = 'plain'", "it is a str"),
        (GOOD.format(name="loramoe"), "two readers have this name"),
    ],
)
def test_broken_entry_points_are_named(
    source: str, why: str, installed: Any, tmp_path: Path
) -> None:
    installed("broken_reader_package", source)
    with pytest.raises(AdapterError, match=re.escape(why)) as caught:
        load_adapter(tmp_path)
    assert caught.value.code == "bad_reader"


def test_two_packages_with_one_name(installed: Any) -> None:
    for module in ("first_reader_package", "second_reader_package"):
        installed(module, GOOD.format(name="same"))
    with pytest.raises(AdapterError, match="same") as caught:
        registry.formats()
    assert caught.value.code == "bad_reader"
