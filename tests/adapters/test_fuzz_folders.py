"""One tensor or one key of a good folder changed: an AdapterError, or exactly the same adapter.

Never another exception, and never an adapter that silently computes something else.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bad_adapters import FIT, GOOD, weights_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_adapters import BASE_LLAMA, random_adapter, router_spec
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from vllm_lora_ext.adapters import check_fits, load_adapter, write_native
from vllm_lora_ext.adapters.hf import model_shapes
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

FORMATS = ["plain", "loramoe", "meteora", "native"]
TENSOR_CHANGES = {
    "drop": None,
    "duplicate": None,
    "rename": None,
    "transpose": lambda t: t.T if t.ndim == 2 else t[None],
    "flatten": lambda t: t.reshape(-1),
    "stack": lambda t: t[None],
    "cut_rows": lambda t: t[:-1],
    "cut_columns": lambda t: t[..., :-1],
    "double_rows": lambda t: torch.cat([t, t]),
    "empty": lambda t: t[:0],
    "nan": lambda t: t.flatten().index_fill(0, torch.tensor(0), float("nan")).reshape(t.shape),
    "inf": lambda t: t.flatten().index_fill(0, torch.tensor(0), float("-inf")).reshape(t.shape),
    "float64": lambda t: t.double(),
    "int32": lambda t: t.int(),
}
RENAMES = [
    ("base_model.model.", ""), ("layers.0.", "layers.9."), ("lora_A", "lora_B"),
    ("lora_B", "lora_A"), (".weight", ".default.weight"), (".weight", ".bias"), (".weight", ""),
    ("lora_", "lora_x"), ("proj", "proj2"), ("A1", "A8"), ("router", "threshold"),
    ("moe_gate", "gate"), ("model.", ""), ("", "x."),
]  # fmt: skip
JUNK = [
    None, True, False, 0, -1, 2**70, 10**400, -0.5, 1e300, "", "x", "\n", "../x", [], [None], {},
    {"a": 1}, [[1]],
]  # fmt: skip


@pytest.fixture(scope="module")
def native_good(tmp_path_factory):
    head = GateSpec(
        source="router", blocks=(2, 2), score="softmax", bias="select", select="threshold",
        threshold=0.4, threshold_head=True,
    )  # fmt: skip
    self_gated = GateSpec(source="self", blocks=(1,) * 6, select="top_k", k=3, weight="one")
    adapter = random_adapter(
        AutoConfig.from_pretrained(BASE_LLAMA), 5, [router_spec(), head, self_gated], layers=[0]
    )
    return write_native(adapter, tmp_path_factory.mktemp("native") / "good")


@pytest.fixture(scope="module")
def good(native_good, bases):
    """Format → (folder, tensors, adapter, shapes of its base)."""
    folders = {name.split("-")[0]: path for name, path in GOOD.items()} | {"native": native_good}
    found = {}
    for name, folder in folders.items():
        adapter = load_adapter(folder)
        shapes = model_shapes(bases[adapter.base_model or "base_llama"])
        found[name] = (folder, load_file(weights_file(folder)), adapter, shapes)
    return found


def error_or_same(folder, want, shapes):
    try:
        adapter = load_adapter(folder)
        check_fits(adapter, shapes, torch.float16, base_name="base", **FIT)
    except AdapterError as error:
        assert "fix: " in error.text, error.text
        return
    assert set(adapter.modules) == set(want.modules)
    for name, module in adapter.modules.items():
        other = want.modules[name]
        assert (module.gate, module.kind, module.head_bias) == (
            other.gate, other.kind, other.head_bias,
        )  # fmt: skip
        for field in ("a_RK", "b_NR", "router_GK", "bias_G", "head_K"):
            one, two = getattr(module, field), getattr(other, field)
            assert (one is None and two is None) or torch.equal(one, two), f"{name} {field}"


def changed(tensors, name, change, renaming):
    tensors = dict(tensors)
    new = name.replace(*renaming, 1)
    if change in ("rename", "duplicate") and new in tensors:
        change = "drop"  # there can be only one of a name
    if change == "drop":
        del tensors[name]
    elif change == "rename":
        tensors[new] = tensors.pop(name)
    elif change == "duplicate":
        tensors[new] = 2 * tensors[name]  # not equal: taking either one must show
    else:
        tensors[name] = TENSOR_CHANGES[change](tensors[name])
    return {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}


SETTINGS = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("system", FORMATS)
@SETTINGS
@given(data=st.data())
def test_one_tensor(system, data, good, tmp_path):
    folder, tensors, want, shapes = good[system]
    name = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(sorted(TENSOR_CHANGES)))
    renaming = data.draw(st.sampled_from(RENAMES))
    dst = tmp_path / "bad"
    shutil.rmtree(dst, ignore_errors=True)
    shutil.copytree(folder, dst)
    save_file(changed(tensors, name, change, renaming), weights_file(dst))
    error_or_same(dst, want, shapes)


def json_files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*.json"))


def places(value, path=()):
    """Paths of all keys that stand for themselves: gate fields are left to their defaults."""
    if isinstance(value, dict) and "source" not in value:
        for key in value:
            yield (*path, key)
            yield from places(value[key], (*path, key))


# Values that make another, valid adapter: changing them is the user's right.
FREE = {"system", "base_model_name_or_path", "r", "lora_alpha", "temperature", "top_k"}


@pytest.mark.parametrize("system", FORMATS)
@SETTINGS
@given(data=st.data())
def test_one_key(system, data, good, tmp_path):
    folder, _, want, shapes = good[system]
    file = data.draw(st.sampled_from(json_files(folder)))
    config = json.loads((folder / file).read_text())
    path = data.draw(st.sampled_from(list(places(config))))
    change = data.draw(st.sampled_from(["drop", "rename", "duplicate", "nan", "junk", "add"]))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    key = path[-1]
    value = data.draw(st.sampled_from(JUNK))
    match change:
        case "drop":
            del inner[key]
        case "rename":
            inner[data.draw(st.sampled_from([key + "x", key.upper() + "_", "", " " + key]))] = (
                inner.pop(key)
            )
        case "add":
            inner["new_key"] = value
        case "nan":
            inner[key] = float("nan")
        case "junk":
            # A number of the right kind, a flag switched on and a gate taken off are no mistakes.
            legal = isinstance(value, (int, float)) and key in FREE
            if legal or (value is True and key == "use_rslora") or "routing" in path[:-1]:
                value = [None]
            inner[key] = value
    text = json.dumps(config)
    if change == "duplicate":
        mark = json.dumps(key) + ":"
        text = text.replace(mark, f"{mark} null, {mark}", 1)
    dst = tmp_path / "bad"
    shutil.rmtree(dst, ignore_errors=True)
    shutil.copytree(folder, dst)
    (dst / file).write_text(text)
    error_or_same(dst, want, shapes)


@pytest.mark.parametrize("system", ["plain", "meteora"])
@SETTINGS
@given(data=st.data())
def test_bytes_of_the_header(system, data, good, tmp_path):
    """Flipped bytes in the length or the table of contents, or a cut anywhere."""
    folder, _, want, shapes = good[system]
    content = bytearray(weights_file(folder).read_bytes())
    header = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, header + 7))
        content[at] = data.draw(st.integers(0, 255))
    dst = tmp_path / "bad"
    shutil.rmtree(dst, ignore_errors=True)
    shutil.copytree(folder, dst)
    weights_file(dst).write_bytes(content)
    error_or_same(dst, want, shapes)
