"""Every format, one thing changed: a typed error, or exactly what the changed files say.

A folder of random shape is written, one tensor, key or file of it is changed, and the folder is
loaded. What loads is compared with `tests/definitions.py`, which reads the changed files by
itself; and what can only be damage (a lost tensor, a misspelt key) must not change a bit.

`LORA_EXT_FUZZ=400` runs 400 changes of every format in place of the usual number.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import cache
from pathlib import Path

import definitions
import numpy as np
import pytest
import torch
from definitions import Folder, Layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_adapters import normal
from make_formats import FORMATS, system_of, write_random
from make_multi import write_plain
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import Limits, check_fits, load_adapter
from vllm_lora_ext.adapters.blocks import activation
from vllm_lora_ext.adapters.hf import delta_reference, model_shapes
from vllm_lora_ext.convert import differing
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing.mix import mix_reference

ROOT = Path(__file__).parents[2]
ERRORS = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
CODES = set(re.findall(r"^\| `([a-z_]+)` \|", ERRORS, re.MULTILINE))
PROFILE = settings(
    max_examples=int(os.environ.get("LORA_EXT_FUZZ", "45")),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
CONFIG, SIDE = "adapter_config.json", "routing.json"
SEEDS, TOKENS = 5, 3
BASES = ("base_llama", "base_qwen2")
# Whether a loaded folder may differ from the good one: it must be what its own files say anyway.
SAME, OTHER = "same", "other"

RENAMES = [
    ("base_model.model.", ""), ("layers.0.", "layers.1."), ("layers.1.", "layers.9."),
    ("q_proj", "k_proj"), ("up_proj", "gate_proj"), ("mlp", "self_attn"), ("proj", "proj2"),
    ("_A", "_B"), ("_B", "_A"), ("_a", "_b"), ("A.weight", "A.default.weight"), (".weight", ""),
    (".weight", ".bias"), ("lora_", "lora_x"), ("0", "00"), (".0.", ".1."), ("A0", "A1"),
    ("router", "threshold"), ("moe_gate", "gate"), ("experts", "expert"), ("model.", ""),
    ("", "x."), ("w1", "w2"), ("lora", "loranew"), ("_b", "_d"), (".mlp.weight", ".weight"),
    ("base_model.model.", "base_model.model.base_model.model."), (".weight", ".weight "),
]  # fmt: skip
RESHAPES = {
    "transpose": lambda t: t.transpose(-1, -2) if t.ndim > 1 else t[:, None],
    "flatten": lambda t: t.reshape(-1) if t.ndim > 1 else t[None],
    "stack": lambda t: t[None],
    "cut_rows": lambda t: t[:-1],
    "cut_columns": lambda t: t[..., :-1],
    "double_rows": lambda t: torch.cat([t, t]),
    "double_columns": lambda t: torch.cat([t, t], dim=-1),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.flatten()[0],
}
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8,
          torch.bool]  # fmt: skip
POISON = [float("nan"), float("inf"), float("-inf")]
JUNK = [
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e300, 2**70, 10**400, float("nan"), "8", "x",
    "", [], [None], [2, 2], {}, {"a": 1}, [[1]], "LORA", "LOHA", "MOLE", "MMOELORA", "top_k",
    "router", "softmax", "svd", "abs", "mini", "bat", "relu",
]  # fmt: skip
KEYS = ["new_key", "use_dora", "use_rslora2", "lora_nums", "top_k", "num_experts", "scale"]
# A file without this key is a good file, of another adapter: the format gives it a default.
DEFAULTS = {
    ("loramoe_moepeft", "use_rslora"), ("mola_moepeft", "use_rslora"), ("mixlora", "use_rslora"),
    ("mixlora", "act_fn"), ("mixlora", "expert_lora"), ("lora_mixer", "temperature"),
    ("lora_mixer", "renormalise"),
}  # fmt: skip
# Tables whose entries are settings of their own: one more or less is another adapter.
TABLES = {"rank_pattern", "alpha_pattern", "lambda_pattern", "expert_lora", "routing", "default"}
# One config serves both.
TWINS = {"loramoe", "hydralora"}


@pytest.fixture(scope="module")
def good(tmp_path_factory, bases):
    """(format, seed) → (folder, its adapter, the base model)."""
    root = tmp_path_factory.mktemp("good")

    @cache
    def make(name, seed):
        base = BASES[seed % 2]
        folder = write_random(name, root / f"{name}-{seed}", seed, base, small=True)
        return folder, load_adapter(folder), bases[base]

    return make


class Change:
    """A copy of a good folder to be changed, and whether the result may be another adapter."""

    def __init__(self, data, folder, place, system):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        self.data, self.folder, self.system, self.outcome = data, place, system, SAME

    def draw(self, choices):
        return self.data.draw(st.sampled_from(choices))

    def tensors(self, change):
        """Apply `change(tensors, name)` to one tensor of one weights file."""
        files = sorted(self.folder.rglob("*.safetensors"))
        file = self.draw(files)
        tensors = load_file(file)
        if tensors:
            change(tensors, self.draw(sorted(tensors)))
        save(tensors, file)

    def json(self, change, name="*.json"):
        """Apply `change(object, key)` to one key of one JSON file, however deep."""
        file = self.draw(sorted(self.folder.rglob(name)))
        value = json.loads(file.read_text())
        path = self.draw(sorted(paths(value)))
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if TABLES & set(path[:-1]):
            self.outcome = OTHER
        change(inner, path[-1])
        file.write_text(json.dumps(value))
        return file, path


def save(tensors, file):
    whole = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def paths(value, above=()):
    for key, inner in value.items():
        yield (*above, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*above, key))


def drop_tensor(c):
    c.tensors(lambda tensors, name: tensors.pop(name))
    moves_a_layer(c)


def rename_tensor(c):
    old, new = c.draw(RENAMES)

    def change(tensors, name):
        moved = tensors.pop(name)
        tensors.setdefault(name.replace(old, new, 1), moved)

    c.tensors(change)
    moves_a_layer(c)


def duplicate_tensor(c):
    """The second one has other values: taking either must show."""
    old, new = c.draw(RENAMES)
    c.tensors(lambda t, name: t.setdefault(name.replace(old, new, 1), (2 * t[name]).to(t[name])))
    moves_a_layer(c)


def moves_a_layer(c):
    """MiSS has one tensor per layer: one that went elsewhere, or is gone, leaves no trace."""
    if c.system == "miss":
        c.outcome = OTHER


def reshape_tensor(c):
    kind = c.draw(sorted(RESHAPES))
    if kind == "transpose":  # of a square matrix: other values
        c.outcome = OTHER
    c.tensors(lambda tensors, name: tensors.update({name: RESHAPES[kind](tensors[name])}))


def cast_tensor(c):
    dtype = c.draw(DTYPES)
    c.outcome = OTHER  # rounded
    c.tensors(lambda tensors, name: tensors.update({name: tensors[name].to(dtype)}))


def poison_tensor(c):
    value, place = c.draw(POISON), c.data.draw(st.integers(0, 1 << 20))

    def change(tensors, name):
        flat = tensors[name].flatten()
        if flat.is_floating_point() and len(flat):
            flat[place % len(flat)] = value
            tensors[name] = flat.reshape(tensors[name].shape)

    c.tensors(change)


def drop_key(c):
    _, path = c.json(lambda inner, key: inner.pop(key))
    if (c.system, path[-1]) in DEFAULTS:
        c.outcome = OTHER


def rename_key(c):
    to = c.draw(["{}x", "{}_", " {}", "x"])

    def change(inner, key):
        value = inner.pop(key)
        inner[to.format(key)] = value

    c.json(change)


def upper_key(c):
    c.json(lambda inner, key: inner.update({key.upper() + "_": inner.pop(key)}))


def change_value(c):
    value = c.draw(JUNK)
    c.json(lambda inner, key: inner.update({key: value}))
    c.outcome = OTHER


def add_key(c):
    name, value = c.draw(KEYS), c.draw(JUNK)
    c.json(lambda inner, key: inner.setdefault(name, value))


def repeat_key(c):
    file, path = c.json(lambda inner, key: None)
    mark = f"{json.dumps(path[-1])}:"
    file.write_text(file.read_text().replace(mark, f"{mark} 3, {mark}", 1))


def lose_sidecar(c):
    (c.folder / SIDE).unlink(missing_ok=True)


def lose_config(c):
    c.draw(sorted(c.folder.rglob("*.json"))).unlink()


def lose_weights(c):
    c.draw(sorted(c.folder.rglob("*.safetensors"))).unlink()


def add_file(c):
    name = c.draw([
        "README.md", "adapter_model.bin", "more.safetensors", "model.safetensors", "x.pt",
        "xlora_config.json", "xlora_classifier.safetensors", "adapter_model.safetensors.index.json",
        "extra",
    ])  # fmt: skip
    if name == "extra":
        write_plain(c.folder / name, 9, layers=[0])
    elif not (c.folder / name).exists():
        content = b"" if not name.endswith("safetensors") else bytes(8)
        (c.folder / name).write_bytes(content)


def empty_weights(c):
    save({}, c.draw(sorted(c.folder.rglob("*.safetensors"))))


def cut_weights(c):
    file = c.draw(sorted(c.folder.rglob("*.safetensors")))
    content = file.read_bytes()
    file.write_bytes(content[: c.data.draw(st.integers(0, len(content) - 1))])


def flip_a_byte(c):
    """Of the length or of the table of contents: the values behind them have no checksum."""
    file = c.draw(sorted(c.folder.rglob("*.safetensors")))
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[c.data.draw(st.integers(0, header + 7))] = c.data.draw(st.integers(0, 255))
    file.write_bytes(content)
    c.outcome = OTHER


def add_another_format(c):
    """Its tensors, beside the folder's own; and sometimes its subfolders and settings."""
    name = c.draw([n for n in FORMATS if system_of(n) != c.system])
    base = BASES[c.data.draw(st.integers(0, 1))]
    other = write_random(name, c.folder.parent / "other", 3, base, small=True)
    weights = sorted(c.folder.glob("*.safetensors")) or [c.folder / "adapter_model.safetensors"]
    own = load_file(weights[0]) if weights[0].exists() else {}
    added = next((load_file(file) for file in sorted(other.glob("*.safetensors"))), {})
    save(added | own, weights[0])
    if not added or c.draw([True, False]):
        for entry in other.iterdir():
            if entry.is_dir() and not (c.folder / entry.name).exists():
                shutil.copytree(entry, c.folder / entry.name)
        if not (c.folder / SIDE).exists() and (other / SIDE).exists():
            shutil.copy(other / SIDE, c.folder / SIDE)
    shutil.rmtree(other)


def swap_weights(c):
    """Another format's tensors under this one's config."""
    twins = TWINS if c.system in TWINS else {c.system}
    name = c.draw([n for n in FORMATS if system_of(n) not in twins])
    other = write_random(name, c.folder.parent / "other", 4, small=True)
    own = sorted(c.folder.glob("*.safetensors"))
    if own and (files := sorted(other.glob("*.safetensors"))):
        shutil.copy(files[0], own[0])
        c.outcome = OTHER  # two formats may share their names (a bank of MoRAM, ordinary LoRA)
    shutil.rmtree(other)


CHANGES = [
    drop_tensor, rename_tensor, duplicate_tensor, reshape_tensor, cast_tensor, poison_tensor,
    drop_key, rename_key, upper_key, change_value, change_value, add_key, repeat_key, lose_sidecar,
    lose_config, lose_weights, add_file, empty_weights, cut_weights, flip_a_byte,
    add_another_format, swap_weights,
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@PROFILE
@given(data=st.data())
def test_one_change(name, data, good, tmp_path):
    folder, want, base = good(name, data.draw(st.integers(0, SEEDS - 1)))
    change = Change(data, folder, tmp_path / "changed", system_of(name))
    data.draw(st.sampled_from(CHANGES))(change)
    try:
        adapter = load_adapter(change.folder)
        check_fits(adapter, model_shapes(base), torch.float32)
    except AdapterError as error:
        assert error.code in CODES
        assert "fix: " in error.text and len(error.text) < 2500, error.text
        return
    if change.outcome == SAME:
        assert not differing(adapter, want)
    assert_is_what_the_files_say(change.folder, adapter, base)


def assert_is_what_the_files_say(path, adapter, base):
    folder, rng = Folder(path), np.random.default_rng(0)
    assert set(adapter.modules) <= folder.layers()
    for name in sorted(folder.layers()):
        layer, linear = Layer(folder, name), base.get_submodule(name)
        x_TK = normal(rng, TOKENS, linear.in_features)
        want_TN = torch.stack([definitions.delta(layer, x) for x in x_TK])
        got_TN = torch.zeros_like(want_TN)
        if name in adapter.modules:
            got_TN = delta_reference(adapter.modules[name], x_TK).double()
        assert_close(got_TN, want_TN, name)
    assert set(adapter.blocks) == folder.blocks()
    for name, block in adapter.blocks.items():
        mlp = base.get_submodule(name)
        linears = {n: getattr(mlp, n) for n in ("gate_proj", "up_proj", "down_proj")}
        weights = {n: linear.weight for n, linear in linears.items()}
        x_TK, act = normal(rng, TOKENS, block.router_GK.shape[1]), base.config.hidden_act
        got_TN = mix_reference(block, x_TK, linears, activation(block.act or act)).double()
        rows = [definitions.mixlora_block(folder, name, x, weights, act) for x in x_TK]
        assert_close(got_TN, torch.stack(rows), name)


def assert_close(got, want, name):
    error, size = float((got - want).abs().max()), float(want.abs().max())
    assert error <= 1e-4 * max(size, 1e-3), f"{name}: off by {error:.1e} of {size:.1e}"


@pytest.mark.parametrize("name", FORMATS)
def test_the_good_ones_are_what_their_files_say(name, good):
    for seed in range(SEEDS):
        folder, adapter, base = good(name, seed)
        check_fits(adapter, model_shapes(base), torch.float32, base_name=adapter.base_model)
        assert_is_what_the_files_say(folder, adapter, base)


@pytest.mark.parametrize("name", ["gralora", "loha", "lokr", "miss", "vblora", "vera"])
def test_what_grows_in_memory_is_counted_before_it_does(name, tmp_path):
    """Files of a few kilobytes may stand for matrices of any size."""
    folder = write_random(name, tmp_path / "a", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    stored = sum(4 * t.numel() for t in tensors.values())
    assert load_adapter(folder, Limits(read_bytes=100 * stored))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, Limits(read_bytes=stored))
    assert caught.value.code == "too_large"


def test_a_small_file_that_asks_for_terabytes(tmp_path):
    folder = write_random("vera", tmp_path / "a", 1, small=True)
    for name in (CONFIG, SIDE):
        value = json.loads((folder / name).read_text())
        if name == CONFIG:
            value |= {"r": 60000, "save_projection": False}
        else:
            value["sizes"] = {layer: [1 << 24, 1 << 24] for layer in value["sizes"]}
        (folder / name).write_text(json.dumps(value))
    tensors = load_file(folder / "adapter_model.safetensors")
    save({n: t for n, t in tensors.items() if "lambda" in n}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    assert caught.value.code == "too_large"
