"""LoRA-Mixer: ordinary adapters and routers, against a plain loop over tokens and experts.

There is no published code: the loop below is the paper's definition, written a second time.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from bad_adapters import with_json, with_tensors
from make_multi import write_lora_mixer, write_plain
from safetensors.torch import load_file

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter, delta_reference
from vllm_lora_ext.errors import AdapterError

SIDE = "routing.json"
IDS = torch.randint(4, 380, (1, 40), generator=torch.Generator().manual_seed(0))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {
    "usual": ("base_llama", {}),
    "one": ("base_qwen2", {"ranks": (4,), "k": 1}),
    "k_1": ("base_llama", {"ranks": (1, 6, 3, 3, 2), "k": 1, "use_rslora": True}),
    "k_E": ("base_qwen2", {"ranks": (7, 2, 3), "k": 3, "targets": ALL}),
    "score": ("base_llama", {"settings": {"renormalise": False, "temperature": 0.5}}),
    "warm": ("base_qwen2", {"k": 2, "settings": {"temperature": 2.5}, "layers": [1]}),
    "prefix": ("base_llama", {"prefix": "base_model.model."}),
}


def plain_loop(folder, layer, x_TK):
    said = json.loads((folder / SIDE).read_text())
    routers = load_file(folder / "adapter_model.safetensors")
    router_EK = next(t for name, t in routers.items() if name.endswith(f"{layer}.router.weight"))
    rows = []
    for x_K in x_TK:
        logits = [float(row @ x_K) / said.get("temperature", 1) for row in router_EK]
        p = [math.exp(value - max(logits)) for value in logits]
        p = [value / sum(p) for value in p]
        chosen = sorted(range(len(p)), key=lambda e: -p[e])[: said["top_k"]]
        total = sum(p[e] for e in chosen) if said.get("renormalise", True) else 1.0
        y_N = 0
        for e in chosen:
            name = said["expert_order"][e]
            config = json.loads((folder / name / "adapter_config.json").read_text())
            tensors = load_file(folder / name / "adapter_model.safetensors")
            a_RK = tensors[f"base_model.model.{layer}.lora_A.weight"]
            b_NR = tensors[f"base_model.model.{layer}.lora_B.weight"]
            root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
            y_N = y_N + p[e] / total * config["lora_alpha"] / root * (b_NR @ (a_RK @ x_K))
        rows.append(y_N)
    return torch.stack(rows)


@pytest.mark.parametrize("case", SHAPES)
def test_equals_the_plain_loop(case, bases, tmp_path):
    base, shape = SHAPES[case]
    folder = write_lora_mixer(tmp_path / "a", 3, base, **shape)
    adapter = load_adapter(folder)
    assert (adapter.system, adapter.base_model) == ("lora_mixer", base)
    assert adapter.rank == sum(shape.get("ranks", (3, 5, 2)))
    generator = torch.Generator().manual_seed(1)
    for name, module in adapter.modules.items():
        x_TK = torch.randn(7, module.a_RK.shape[1], generator=generator)
        want = plain_loop(folder, name, x_TK)
        assert want.abs().mean() > 0.01
        assert (delta_reference(module, x_TK) - want).abs().max() < 1e-5
    model = bases[base]
    before = model(IDS).logits
    with apply_adapter(model, adapter):
        got = model(IDS).logits
    assert (got - before).abs().mean() > 0.02
    with apply_adapter(model, load_adapter(write_native(adapter, tmp_path / "b"))):
        assert torch.equal(model(IDS).logits, got)


def side(**change):
    return with_json(lambda c: c.update(change), SIDE)


def unset(key):
    return with_json(lambda c: c.pop(key), SIDE)


def routers(change):
    return with_tensors(change)


def no_weights(dst, good):
    side()(dst, good)
    (dst / "adapter_model.safetensors").unlink()


def no_sidecar(dst, good):
    side()(dst, good)
    (dst / SIDE).unlink()


def other_size(dst, good):
    side()(dst, good)
    write_plain(dst / "expert_1", 1, "base_qwen2", r=5, targets=("q_proj", "v_proj", "o_proj"),
                layers=[0])  # fmt: skip


BAD = {
    "other_size": (other_size, "bad_shape", "expert_1"),
    "no_sidecar": (no_sidecar, "missing_setting", "lora-mixer"),
    "no_weights": (no_weights, "missing_file", "safetensors"),
    "no_system": (unset("system"), "missing_setting", "lora-mixer"),
    "other_system": (side(system="meteora"), "bad_value", "meteora"),
    "no_order": (unset("expert_order"), "missing_setting", "expert_order"),
    "no_k": (unset("top_k"), "missing_setting", "top_k"),
    "k_too_large": (side(top_k=4), "k_too_large", "top_k"),
    "cold": (side(temperature=0), "bad_gate", "temperature"),
    "renormalise": (side(renormalise="x"), "bad_value", "renormalise"),
    "renormalise_null": (side(renormalise=None), "bad_value", "renormalise"),
    "unknown_key": (side(topk=1), "unknown_key", "topk"),
    "order_short": (side(expert_order=["expert_0", "expert_1"]), "setting_mismatch", "expert_2"),
    "order_strange": (side(expert_order=["expert_0", "law", "expert_2"]), "missing_file", "law"),
    "router_gone": (routers(lambda t: t.pop(min(t))), "missing_tensor", "router"),
    "router_wide": (routers(lambda t: t.update({min(t): torch.ones(3, 5)})), "bad_shape", "router"),
    "router_rows": (routers(lambda t: t.update({min(t): t[min(t)][:2].clone()})),
                    "setting_mismatch", "expert_order"),
    "router_nan": (routers(lambda t: t[min(t)].fill_(float("nan"))), "not_finite", "router"),
    "router_unused": (routers(lambda t: t.update({"model.layers.0.x.router.weight": t[min(t)]})),
                      "unexpected_tensor", "layers.0.x"),
    "router_bias": (routers(lambda t: t.update({"model.x.router.bias": torch.ones(3)})),
                    "unexpected_tensor", "bias"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_lora_mixer(tmp_path_factory.mktemp("mixer") / "good", 7, layers=[0])


@pytest.mark.parametrize("name", BAD)
def test_broken_folders_are_refused(name, good, tmp_path):
    build, code, text = BAD[name]
    build(tmp_path / "bad", good)
    with pytest.raises(AdapterError, match=rf"(?s){text}") as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == code, caught.value.text
    assert len(caught.value.text) < 1500
