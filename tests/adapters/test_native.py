"""The native format: writing is the inverse of reading, and every unknown thing is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from bad_adapters import add, drop, poison, rename, replace, with_json, with_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_adapters import (
    BASE_LLAMA,
    normal,
    random_adapter,
    random_module,
    random_spec,
    router_spec,
)
from transformers import AutoConfig

from vllm_lora_ext.adapters import RoutedAdapter, check_adapter, load_adapter, write_native
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec, InputNorm


@pytest.fixture(scope="session")
def config():
    return AutoConfig.from_pretrained(BASE_LLAMA)


def same(left: RoutedAdapter, right: RoutedAdapter) -> bool:
    """Equal bit for bit, but for the folder's name."""
    if (left.system, left.base_model, set(left.modules)) != (
        right.system, right.base_model, set(right.modules)
    ):  # fmt: skip
        return False
    if left.columns != right.columns:
        return False
    for name, module in left.modules.items():
        if not same_norm(module.norm, right.modules[name].norm):
            return False
        for field in dataclasses.fields(module):
            one, two = getattr(module, field.name), getattr(right.modules[name], field.name)
            if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
                if one.dtype != two.dtype or not torch.equal(one, two):
                    return False
            elif field.name == "norm":
                continue
            elif isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor) or one != two:
                return False
    return True


def same_norm(one: InputNorm | None, two: InputNorm | None) -> bool:
    if one is None or two is None:
        return one is two
    if (one.width, one.tail_sum, one.tail_squares) != (two.width, two.tail_sum, two.tail_squares):
        return False
    tails = one.tail_G, two.tail_G
    equal = tails == (None, None) or (None not in tails and torch.equal(*tails))
    return equal and torch.equal(one.row_sums_G, two.row_sums_G)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_round_trip(seed, config, tmp_path):
    adapter = random_adapter(
        config, seed, lambda rng: random_spec(rng, stable=False, wide=True), layers=[0, 2],
        base_model="o/b",
    )  # fmt: skip
    check_adapter(adapter)
    back = load_adapter(write_native(adapter, tmp_path / "a"))
    assert same(adapter, back)
    again = load_adapter(write_native(back, tmp_path / "b"))
    assert again.digest == back.digest


def test_columns_and_gates_that_read_them(config, tmp_path):
    gate = GateSpec(source="position", blocks=(3, 2))
    adapter = random_adapter(config, 1, gate, layers=[0])
    columns = Column(modalities=("image",)), Column(spans=((2, None),), expert="code")
    adapter = dataclasses.replace(adapter, columns=columns)
    assert same(adapter, load_adapter(write_native(adapter, tmp_path / "a")))
    with pytest.raises(AdapterError, match="bad_gate"):
        load_adapter(
            write_native(dataclasses.replace(adapter, columns=columns[:1]), tmp_path / "b")
        )


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def fused(config):
    """q, k and v, each with experts of its own, behind one router."""
    spec = dataclasses.replace(router_spec(), normalise="layer")
    adapter = random_adapter(config, 1, spec, targets=QKV, layers=[0, 1])
    modules = dict(adapter.modules)
    for name, module in adapter.modules.items():
        q = adapter.modules[name.rsplit(".", 1)[0] + ".q_proj"]
        modules[name] = dataclasses.replace(
            module, router_GK=q.router_GK, logit_bias_G=q.logit_bias_G, norm=q.norm
        )
    return dataclasses.replace(adapter, modules=modules)


def test_one_router_for_a_fused_layer_stands_in_the_file_once(fused, tmp_path):
    folder = write_native(fused, tmp_path / "a")
    section = json.loads((folder / "adapter_config.json").read_text())["routing"]
    stem = "model.layers.{}.self_attn.{}_proj"
    first = {stem.format(i, s): stem.format(i, "k") for i in (0, 1) for s in "qv"}
    assert section["routers"] == first  # the first one by name has it
    back = load_adapter(folder)
    assert same(fused, back)
    for i in (0, 1):
        q, k = (back.modules[stem.format(i, s)] for s in "qk")
        assert q.router_GK is k.router_GK
    assert (
        write_native(back, tmp_path / "b").joinpath("adapter_config.json").read_bytes()
        == (folder / "adapter_config.json").read_bytes()
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda r: {"q_proj": "k_proj", "v_proj": "k_proj"}, None),
        (lambda r: {"self_attn.q_proj": "self_attn.k_proj", "v_proj": "k_proj"}, None),
        (lambda r: {}, "missing_tensor"),
        (lambda r: r | {"gate_proj": "k_proj"}, "bad_gate"),
        (lambda r: {"q_proj": "up_proj", "v_proj": "k_proj"}, "bad_gate"),
        (lambda r: {"q_proj": "q_proj", "v_proj": "k_proj"}, "bad_gate"),
        (lambda r: {"q_proj": 3, "v_proj": "k_proj"}, "bad_gate"),
        (lambda r: {"q_proj": "v_proj", "v_proj": "k_proj"}, "missing_tensor"),
        (lambda r: r | {"k_proj": "q_proj"}, "unexpected_tensor"),
        (lambda r: [], "bad_value"),
    ],
)  # fmt: skip
def test_routers_in_common_are_read_strictly(fused, tmp_path, change, code):
    folder = write_native(fused, tmp_path / "a")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["routing"]["routers"] = change(config["routing"]["routers"])
    path.write_text(json.dumps(config))
    if code is None:
        assert same(fused, load_adapter(folder))
    else:
        with pytest.raises(AdapterError) as caught:
            load_adapter(folder)
        assert caught.value.code == code


def test_another_gate_on_one_router_is_refused(fused, tmp_path):
    name = "model.layers.0.self_attn.v_proj"
    other = dataclasses.replace(fused.modules[name].gate, k=1)
    changed = dict(fused.modules)
    changed[name] = dataclasses.replace(fused.modules[name], gate=other)
    folder = write_native(dataclasses.replace(fused, modules=changed), tmp_path / "a")
    assert load_adapter(folder).modules[name].gate == other  # it has a copy of its own
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["routing"]["routers"][name] = "model.layers.0.self_attn.k_proj"
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError):
        load_adapter(folder)


def test_embeddings_and_half_precision(tmp_path):
    rng = np.random.default_rng(3)
    modules = {
        "model.embed_tokens": random_module(rng, 384, 96, GateSpec(), kind="embedding"),
        "lm_head": random_module(rng, 96, 384, router_spec()),
    }
    adapter = RoutedAdapter(modules, system="mine", base_model="b")
    assert same(adapter, load_adapter(write_native(adapter, tmp_path / "a")))
    half = load_adapter(write_native(adapter, tmp_path / "b", torch.bfloat16))
    for name, module in half.modules.items():
        assert torch.equal(module.a_RK, modules[name].a_RK.bfloat16().float())
        assert torch.equal(module.b_NR, modules[name].b_NR.bfloat16().float())
    assert torch.equal(half.modules["lm_head"].router_GK, modules["lm_head"].router_GK)


def test_the_digest_follows_every_part(config, tmp_path):
    adapter = random_adapter(config, 1, router_spec(), targets=["up_proj"], layers=[0])
    (name, module), = adapter.modules.items()  # fmt: skip
    variants = [
        module,
        dataclasses.replace(module, router_GK=module.router_GK * 1.01),
        dataclasses.replace(module, b_NR=module.b_NR * 1.01),
        dataclasses.replace(module, gate=dataclasses.replace(module.gate, k=1)),
    ]
    digests = set()
    for i, variant in enumerate(variants):
        changed = RoutedAdapter({name: variant}, system="random")
        digests.add(load_adapter(write_native(changed, tmp_path / str(i))).digest)
    assert len(digests) == len(variants)


@pytest.fixture(scope="session")
def good(config, tmp_path_factory):
    """Three kinds of gates; one module with every tensor that the format has."""
    head = GateSpec(
        source="router", blocks=(2, 2, 3), score="softmax", bias="select", select="threshold",
        threshold=0.4, threshold_head=True,
    )  # fmt: skip
    self_gated = GateSpec(source="self", blocks=(1,) * 6, select="top_k", k=3, weight="one")
    adapter = random_adapter(config, 5, [router_spec(), head, self_gated], layers=[0])
    folder = tmp_path_factory.mktemp("native") / "good"
    return write_native(adapter, folder)


def with_routing(change):
    return with_json(lambda c: change(c["routing"]["default"]))


def set_default(**fields):
    return with_json(lambda c: c["routing"].update(default=fields))


NATIVE = {
    "unknown_top": (with_json(lambda c: c.update(lora_alpha=3)), "unknown_key", "lora_alpha"),
    "unknown_routing": (
        with_json(lambda c: c["routing"].update(temperature=3)), "unknown_key", "temperature",
    ),
    "unknown_gate": (with_routing(lambda g: g.update(top_k=3)), "unknown_key", "top_k"),
    "version_2": (with_json(lambda c: c.update(format_version=2)), "unknown_version", "version"),
    "version_true": (with_json(lambda c: c.update(format_version=True)), "unknown_version", ""),
    "no_routing": (with_json(lambda c: c.pop("routing")), "missing_key", "routing"),
    "no_system": (with_json(lambda c: c.pop("system")), "missing_key", "system"),
    "system_number": (with_json(lambda c: c.update(system=3)), "bad_value", "system"),
    "targets_text": (with_json(lambda c: c.update(target_modules="q")), "bad_value", "target_"),
    "base_number": (with_json(lambda c: c.update(base_model_name_or_path=3)), "bad_value", "base_"),
    "target_lost": (
        with_json(lambda c: c["target_modules"].append("model.layers.1.mlp.up_proj")),
        "missing_tensor", "layers.1.mlp.up_proj",
    ),
    "target_unnamed": (
        with_json(lambda c: c["target_modules"].pop()), "unexpected_tensor", "target_modules",
    ),
    "gate_of_nobody": (
        with_json(lambda c: c["routing"]["modules"].update({"x_proj": {}})), "bad_gate", "x_proj",
    ),
    "gate_null": (with_json(lambda c: c["routing"].update(default=None)), "bad_value", "default"),
    "routing_list": (with_json(lambda c: c.update(routing=[])), "bad_value", "routing"),
    "k_beyond": (
        set_default(source="router", blocks=[2, 2], select="top_k", k=3), "k_too_large", "k ",
    ),
    "k_zero": (
        set_default(source="router", blocks=[2, 2], select="top_k", k=0), "bad_gate", "'k'",
    ),
    "temperature": (
        set_default(source="router", blocks=[2], weight="softmax", temperature=-1), "bad_gate",
        "temperature",
    ),
    "blocks_other_sum": (
        set_default(source="router", blocks=[2, 2, 2, 9], score="softmax"), "rank_mismatch",
        "blocks",
    ),
    "blocks_many": (
        set_default(source="router", blocks=[1] * 70000), "bad_gate", "blocks",
    ),
    "router_lost": (with_tensors(drop("router.weight")), "missing_tensor", "router"),
    "router_narrow": (
        with_tensors(replace("router.weight", lambda t: t[:, :-1])), "bad_shape", "router",
    ),
    "bias_lost": (with_tensors(drop("router.bias")), "missing_tensor", "bias"),
    "bias_nan": (with_tensors(poison("router.bias", float("nan"))), "not_finite", "bias"),
    "head_lost": (with_tensors(drop("threshold.weight")), "missing_tensor", "threshold"),
    "head_bias_lost": (with_tensors(drop("threshold.bias")), "missing_tensor", "threshold"),
    "head_flat": (
        with_tensors(replace("threshold.weight", lambda t: t[0])), "bad_shape", "threshold",
    ),
    "head_nan": (
        with_tensors(poison("threshold.weight", float("inf"))), "not_finite", "threshold.weight",
    ),
    "a_lost": (with_tensors(drop("lora_A")), "missing_tensor", "lora_A"),
    "a_b_disagree": (
        with_tensors(replace("lora_B", lambda t: t[:, 1:])), "rank_mismatch", "A and B",
    ),
    "extra": (with_tensors(add("model.layers.0.mlp.up_proj.gate.weight", 2)),
              "unexpected_tensor", "gate.weight"),
    "both_kinds": (
        with_tensors(add("model.layers.0.mlp.up_proj.lora_embedding_A.weight", 2, 2)),
        "missing_tensor", "lora_embedding_B",
    ),
    "renamed": (with_tensors(rename("up_proj", "upp_proj")), "missing_tensor", "up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_is_refused(name, good, tmp_path):
    build, code, word = NATIVE[name]
    build(tmp_path / "bad", good)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == code, caught.value.text
    assert word in caught.value.text
    assert "fix: " in caught.value.text


def test_short_names_and_the_longest_tail_wins(tmp_path):
    """What a hand-written config may say: last parts of names, and a gate per kind of layer."""
    rng = np.random.default_rng(0)
    modules = {
        f"model.layers.{i}.mlp.{p}": random_module(rng, 8, 8, GateSpec(), rank=4)
        for i in range(2) for p in ("up_proj", "down_proj")
    }  # fmt: skip
    write_native(RoutedAdapter(modules, system="mine"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    one = {"source": "self", "blocks": [1] * 4, "select": "top_k", "k": 1}
    two = {**one, "k": 2}
    config["target_modules"] = ["up_proj", "mlp.down_proj"]
    config["routing"] = {"default": {}, "modules": {"up_proj": one, "1.mlp.up_proj": two}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    gates = {name: m.gate for name, m in load_adapter(tmp_path).modules.items()}
    assert gates["model.layers.0.mlp.up_proj"].k == 1
    assert gates["model.layers.1.mlp.up_proj"].k == 2
    assert gates["model.layers.1.mlp.down_proj"] == GateSpec()


def test_a_gated_embedding_is_refused():
    rng = np.random.default_rng(0)
    spec = GateSpec(source="self", blocks=(1,) * 4)
    module = dataclasses.replace(
        random_module(rng, 8, 8, GateSpec(), rank=4), gate=spec, kind="embedding"
    )
    with pytest.raises(AdapterError) as caught:
        check_adapter(RoutedAdapter({"embed": module}, system="x"))
    assert caught.value.code == "unsupported_feature"


def test_an_empty_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError) as caught:
        check_adapter(RoutedAdapter({}, system="x"))
    assert caught.value.code == "empty_adapter"
    with pytest.raises(AdapterError) as caught:
        load_adapter(write_native(RoutedAdapter({}, system="x"), tmp_path))
    assert caught.value.code == "empty_adapter"


def test_tensors_own_their_memory(good, tmp_path):
    """Overwriting the file in place must not reach an adapter that is loaded."""
    adapter = load_adapter(good)
    before = {name: m.a_RK.clone() for name, m in adapter.modules.items()}
    file = good / "adapter_model.safetensors"
    content = file.read_bytes()
    try:
        with file.open("r+b") as handle:
            handle.seek(len(content) // 2)
            handle.write(normal(np.random.default_rng(0), len(content) // 8).numpy().tobytes())
        assert all(torch.equal(m.a_RK, before[n]) for n, m in adapter.modules.items())
    finally:
        file.write_bytes(content)
