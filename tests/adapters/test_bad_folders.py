"""Every malformed folder gives one AdapterError with its code, a message and a way to mend it."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from bad_adapters import BAD, FIT, GOOD, build_bad, more_experts, widen, with_json
from make_adapters import random_module

from vllm_lora_ext.adapters import FORMATS, Limits, check_fits, load_adapter, resolve_inside
from vllm_lora_ext.adapters.hf import model_shapes
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.settings import LoraExtSettings
from vllm_lora_ext.summary import summarise

# A word of the message: the field or tensor that is wrong.
FIELDS = {
    "alpha_1e30": "lora_alpha", "alpha_missing": "lora_alpha", "r_zero": "r in adapter_config",
    "r_other": "adapter_config.json", "peft_type_unknown": "peft_type", "dora":
    "lora_magnitude_vector",
    "alora": "Activated LoRA", "pissa": "init_lora_weights", "b_missing": "lora_B",
    "extra_tensor": "surprise", "b_other_rank": "up_proj.lora_B", "a_nan": "up_proj.lora_A",
    "b_inf": "up_proj.lora_B", "b_overflows": "B times its scale of model.layers.0",
    "router_missing": "lora_route", "router_nan": "lora_route", "expert_missing": "lora_A3",
    "top_k_missing": "top_k", "k_more_than_experts": "top_k", "temperature_zero": "temperature",
    "order_unknown": "task_9", "scaling_other": "scaling", "sidecar_unknown_key": "topk",
    "layer_unknown": "model.layers.7.", "other_hidden_size": "q_proj", "other_base":
    "another-model", "rank_too_large": "--max-lora-rank 128", "rank_beyond_vllm": "512",
    "router_too_large": '"max_router_rows": 40',
    "int64": "I64", "unknown_number": "moram_topk", "bias_all": "bias",
    "pickle_only": "vllm-lora-ext convert --allow-pickle",
}  # fmt: skip


@pytest.fixture(scope="session")
def shapes(bases):
    return model_shapes(bases["base_llama"])


def open_below(place):
    """Files of a folder that this process has open."""
    with os.scandir("/proc/self/fd") as handles:
        links = [os.path.realpath(handle.path) for handle in handles]
    return [link for link in links if link.startswith(str(place))]


def check(path, stage, shapes):
    adapter = load_adapter(path)
    assert stage == "fit", "a broken folder was loaded"
    check_fits(adapter, shapes, torch.float32, base_name="/models/base_llama", **FIT)


@pytest.mark.parametrize("name", BAD)
def test_is_refused(name, tmp_path, shapes):
    entry = build_bad(name, tmp_path / name)
    with pytest.raises(AdapterError) as caught:
        check(tmp_path / name, entry.stage, shapes)
    error = caught.value  # held still, with all that its traceback holds
    assert not open_below(tmp_path), "whoever keeps an error keeps no file open"
    assert error.code == entry.code, error.text
    assert FIELDS.get(name, "") in error.text
    assert "fix: " in error.text
    assert len(error.text) < 2000
    assert AdapterError.parse(f"worker died: {error} ...").code == entry.code


@pytest.mark.parametrize("name", GOOD)
def test_the_good_ones_are_good(name, bases):
    adapter = load_adapter(GOOD[name])
    base = bases[adapter.base_model]
    check_fits(adapter, model_shapes(base), torch.float32, base_name=adapter.base_model, **FIT)


NOT_SERVED = [row for row in FORMATS if row.status != "served"]


@pytest.mark.parametrize(
    "row", [row for row in NOT_SERVED if row.name.upper() in row.peft_types],
    ids=lambda row: row.name,
)  # fmt: skip
def test_what_is_known_and_not_served_is_named(row, tmp_path):
    """One refusal for all of them: what it is, and which options of `convert` make a LoRA of it."""
    build_bad("peft_type_unknown", tmp_path / "a")
    (peft_type,) = row.peft_types
    with_json(lambda config: config.update(peft_type=peft_type))(tmp_path / "a", tmp_path / "a")
    with pytest.raises(AdapterError, match=re.escape(row.title)) as caught:
        load_adapter(tmp_path / "a")
    assert caught.value.code == "unsupported_feature"
    assert row.refused in caught.value.text
    assert ("vllm-lora-ext convert" in caught.value.text) == bool(row.needs)
    assert all(f"--{need} {need.upper()}" in caught.value.text for need in row.needs)


def test_router_rows_and_rank_say_what_would_do(tmp_path, shapes):
    more_experts(24)(tmp_path / "a", GOOD["loramoe-a"])
    adapter = load_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match=r'"max_router_rows": 24') as caught:
        check_fits(adapter, shapes, torch.float32, max_rank=32, max_router_rows=16)
    assert caught.value.code == "router_too_large"
    widen(65)(tmp_path / "b", GOOD["plain-a"])
    with pytest.raises(AdapterError, match="--max-lora-rank 128"):
        check_fits(load_adapter(tmp_path / "b"), shapes, torch.float32, max_rank=64)


@pytest.mark.parametrize(("gates", "fits"), [(64, True), (65, False)])
def test_a_threshold_head_has_a_row_of_its_own(gates, fits):
    """`inspect`, the server's check and its slots count a router's rows alike."""
    gate = GateSpec(
        source="router", blocks=(1,) * gates, select="threshold", threshold_head=True
    )  # fmt: skip
    module = random_module(np.random.default_rng(0), 8, 8, gate, rank=gates)
    adapter = RoutedAdapter({"up": module}, system="adamole")
    found, settings = summarise(adapter), LoraExtSettings()
    limits = {"max_rank": 128, "max_router_rows": settings.router_rows(128)}
    asked = [flag for flag in found["flags"] if "max_router_rows" in flag]
    site = Site(1, 8, (8,), 128, limits["max_router_rows"], torch.float32, "cpu")
    assert found["router_rows"] == gates
    if fits:
        assert asked == []
        check_fits(adapter, {"up": (8, 8)}, torch.float32, **limits)
        site.write(0, [module])
        return
    assert asked and '"max_router_rows": 65' in asked[0]
    with pytest.raises(AdapterError, match='"max_router_rows": 65') as caught:
        check_fits(adapter, {"up": (8, 8)}, torch.float32, **limits)
    assert caught.value.code == "router_too_large"
    with pytest.raises(ValueError, match="router rows 65 of 64"):
        site.write(0, [module])


def test_a_missing_folder(tmp_path):
    for path in (tmp_path / "nothing", "no\0thing", "x" * 5000, GOOD["plain-a"] / "a/b"):
        with pytest.raises(AdapterError) as caught:
            load_adapter(path)
        assert caught.value.code == "not_found"


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert caught.value.code == "bad_file"


def test_limits_are_checked_before_memory_is_asked_for():
    for limits in (
        Limits(json_bytes=100), Limits(header_bytes=100), Limits(tensors=10),
        Limits(file_bytes=1000), Limits(read_bytes=1000),
    ):  # fmt: skip
        with pytest.raises(AdapterError) as caught:
            load_adapter(GOOD["plain-a"], limits)
        assert caught.value.code == "too_large"


class TestPaths:
    @pytest.fixture
    def root(self, tmp_path):
        (tmp_path / "root/good").mkdir(parents=True)
        (tmp_path / "root-beside").mkdir()
        (tmp_path / "root/link_out").symlink_to(tmp_path / "root-beside")
        (tmp_path / "root/link_in").symlink_to(tmp_path / "root/good")
        return tmp_path / "root"

    @pytest.mark.parametrize("name", ["good", "./good", "link_in", "good/../good", "later"])
    def test_inside(self, root, name):
        assert resolve_inside(name, [root]).is_relative_to(root)
        assert resolve_inside(root / name, [root]).is_relative_to(root)

    @pytest.mark.parametrize(
        "name",
        ["..", "../root-beside", "good/../../root-beside", "/etc", "link_out", "link_out/x", "",
         "a\0b", "~/x/../../../../../../../../../etc"],
    )  # fmt: skip
    def test_outside(self, root, name):
        with pytest.raises(AdapterError) as caught:
            resolve_inside(name, [root])
        assert caught.value.code == "path_not_allowed"

    def test_no_root_allows_nothing_and_a_second_one_counts(self, root):
        with pytest.raises(AdapterError):
            resolve_inside("good", [])
        assert resolve_inside(root / "good", [root.parent / "root-beside", root])

    def test_a_root_that_is_a_link(self, root):
        link = root.parent / "link"
        link.symlink_to(root)
        assert resolve_inside(link / "good", [link]) == root / "good"


def test_the_hub_cache_may_link_to_its_blobs(tmp_path):
    """Its snapshots are folders of links into `blobs` beside them."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (blobs / f"blob{i}").write_bytes((GOOD["plain-a"] / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/blob{i}")
    assert load_adapter(snapshot).digest == load_adapter(GOOD["plain-a"]).digest
    assert load_adapter(snapshot, roots=[snapshot]).digest == load_adapter(snapshot).digest
    secret = tmp_path / "models--a--b/secret"
    secret.write_text("{}")
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to("../../secret")
    with pytest.raises(AdapterError) as caught:
        load_adapter(snapshot, roots=[snapshot])
    assert caught.value.code == "path_not_allowed"
