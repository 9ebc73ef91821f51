"""Arrow with GenKnowSub against PEFT 0.21.2, which builds the prototypes itself."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from bad_adapters import with_json, with_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from make_multi import write_arrow, write_plain
from peft import ArrowConfig, create_arrow_model

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters import prototypes as prototypes_module
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.prototypes import power_prototype, prototypes, svd_prototype
from vllm_lora_ext.errors import AdapterError

SIDE = "routing.json"
IDS = torch.randint(4, 380, (1, 40), generator=torch.Generator().manual_seed(0))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "two": ("base_llama", {"experts": 4}),
    "one_expert": ("base_qwen2", {"experts": 1, "k": 1, "r": 1, "rng_seed": 0}),
    "all_of_three": ("base_llama", {"experts": 3, "k": 3, "r": 5, "temperature": 0.2}),
    "rslora": ("base_qwen2", {"experts": 5, "k": 1, "r": 7, "use_rslora": True, "rng_seed": -3}),
    "hot": ("base_qwen2", {"experts": 6, "k": 3, "r": 2, "temperature": 3.0, "targets": ALL}),
    "gks": ("base_llama", {"experts": 4, "general": 2, "k": 2, "rng_seed": 2**63 + 5}),
    "gks_one": ("base_qwen2", {"experts": 3, "general": 1, "k": 2, "r": 6, "rng_seed": 123}),
    "gks_three": ("base_llama", {"experts": 2, "general": 3, "k": 2, "targets": ALL}),
}


def peft_model(folder, base):
    given = json.loads((folder / SIDE).read_text())
    config = ArrowConfig(
        top_k=given["top_k"], router_temperature=given["router_temperature"],
        rng_seed=given["rng_seed"], use_gks=given.get("use_gks", False),
    )  # fmt: skip
    paths = [[str(folder / n) for n in given.get(key, [])]
             for key in ("task_adapter_names", "gks_adapter_names")]  # fmt: skip
    return create_arrow_model(copy.deepcopy(base), paths[0], config, paths[1] or None).eval()


def built_prototypes(model):
    """Module name → the buffer that PEFT made in its first forward."""
    return {
        name.removeprefix("base_model.model."): module.lora_arrow["arrow_router"].prototypes
        for name, module in model.named_modules()
        if hasattr(module, "lora_arrow") and "arrow_router" in module.lora_arrow
    }


def logits_with(adapter, model):
    with apply_adapter(model, adapter):
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case, bases, tmp_path):
    base, shape = CASES[case]
    folder = write_arrow(tmp_path, 3, base, **shape)
    model = peft_model(folder, bases[base])
    want = model(IDS).logits
    adapter = load_adapter(folder)
    assert (adapter.system, adapter.base_model) == ("arrow", base)
    stored = built_prototypes(model)
    assert set(stored) == set(adapter.modules)
    off = max(
        torch.minimum((m.router_GK - stored[n]).abs(), (m.router_GK + stored[n]).abs()).max().item()
        for n, m in adapter.modules.items()
    )
    moved = (want - bases[base](IDS).logits).abs().mean().item()
    error = (logits_with(adapter, bases[base]) - want).abs().max().item()
    print(f"{case}: moved {moved:.2f}, logits {error:.1e}, prototypes {off:.1e} from PEFT's")
    assert moved > 0.02
    assert off < 1e-6
    assert error < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("general", [0, 2])
def test_the_folder_that_peft_saves(general, bases, tmp_path):
    shape = {"experts": 3, "general": general}
    model = peft_model(write_arrow(tmp_path / "in", 5, **shape), bases["base_llama"])
    model.save_pretrained(tmp_path / "before")
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "after")  # PEFT has subtracted in place by now
    if general:
        with pytest.raises(AdapterError, match=r"use_gks.*in place") as caught:
            load_adapter(tmp_path / "before")
        assert caught.value.code == "missing_setting"
    for folder, subtract in (("before", True), ("after", False)):
        said = {"use_gks": subtract} if general else None
        adapter = load_adapter(tmp_path / folder, settings=said)
        assert (logits_with(adapter, bases["base_llama"]) - want).abs().max() < 1e-4
    if general:
        twice = load_adapter(tmp_path / "after", settings={"use_gks": True})
        assert (logits_with(twice, bases["base_llama"]) - want).abs().max() > 0.05
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "before/arrow_router")
    assert caught.value.code == "missing_file"
    assert "task_0" in caught.value.text


@pytest.mark.filterwarnings("ignore")
def test_a_config_with_arrow_config_beside_the_experts(bases, tmp_path):
    folder = write_arrow(tmp_path / "in", 6, experts=3)
    model = peft_model(folder, bases["base_llama"])
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "out")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out/arrow_router" / file).rename(tmp_path / "out" / file)
    (tmp_path / "out/arrow_router").rmdir()
    got = logits_with(load_adapter(tmp_path / "out"), bases["base_llama"])
    assert (got - want).abs().max() < 1e-4
    # Folders with names of their own: the sidecar says which is which.
    (tmp_path / "out/task_1").rename(tmp_path / "out/law")
    names = {"expert_order": ["task_0", "law", "task_2"]}
    got = logits_with(load_adapter(tmp_path / "out", settings=names), bases["base_llama"])
    assert (got - want).abs().max() < 1e-4


def test_half_precision_experts_are_routed_in_fp32(bases, tmp_path):
    for e in range(3):
        write_plain(tmp_path / f"e{e}", e, half=True)
    said = {"expert_order": ["e0", "e1", "e2"], "top_k": 2, "temperature": 1, "rng_seed": 4}
    (tmp_path / SIDE).write_text(json.dumps(said | {"router_temperature": 1}))
    model = peft_model_of(tmp_path, said, bases["base_llama"])
    want = model(IDS).logits
    assert (logits_with(load_adapter(tmp_path), bases["base_llama"]) - want).abs().max() < 1e-4


def peft_model_of(folder, said, base):
    config = ArrowConfig(top_k=said["top_k"], rng_seed=said["rng_seed"])
    paths = [str(folder / name) for name in said["expert_order"]]
    return create_arrow_model(copy.deepcopy(base), paths, config).eval()


def test_experts_of_different_ranks(tmp_path):
    """PEFT refuses them; the definition does not need equal ones."""
    for e, rank in enumerate((2, 5)):
        write_plain(tmp_path / f"e{e}", e, r=rank, alpha=3, targets=("q_proj",), layers=[0])
    said = {"expert_order": ["e0", "e1"], "top_k": 1, "temperature": 0.7, "rng_seed": 1}
    (tmp_path / SIDE).write_text(json.dumps(said))
    module = load_adapter(tmp_path).modules["model.layers.0.self_attn.q_proj"]
    assert module.gate.blocks == (2, 5)
    singles = [load_adapter(tmp_path / f"e{e}").modules["model.layers.0.self_attn.q_proj"]
               for e in range(2)]  # fmt: skip
    assert torch.allclose(module.b_NR, torch.cat([s.b_NR for s in singles], dim=1))
    for e, single in enumerate(singles):
        want = power_prototype(single.a_RK, single.b_NR, 1)
        assert (module.router_GK[e] - want).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["power", "svd"])
def test_the_native_copy_is_the_same_adapter(mode, tmp_path):
    adapter = load_adapter(write_arrow(tmp_path / "a", 1, general=1, prototypes=mode,
                                       rng_seed=9 if mode == "power" else None))  # fmt: skip
    copied = load_adapter(write_native(adapter, tmp_path / "b"))
    for name, module in adapter.modules.items():
        assert torch.equal(module.router_GK, copied.modules[name].router_GK)
        assert module.gate == copied.modules[name].gate


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(2, 40), st.integers(1, 30), st.integers(0, 2**32))
def test_prototypes(rank, width, out, seed):
    generator = torch.Generator().manual_seed(seed)
    a_RK, b_NR = torch.randn(rank, width, generator=generator), torch.randn(
        out, rank, generator=generator
    )  # fmt: skip
    exact = svd_prototype(a_RK, b_NR)
    delta = (b_NR @ a_RK).double()
    top = torch.linalg.matrix_norm(delta, 2)
    assert abs(float(exact.norm()) - 1) < 1e-5
    assert float((delta @ exact.double()).norm() / top) > 1 - 1e-5
    # The power iteration goes to the same direction when it is given the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prototypes_module, "POWER_STEPS", 1000)
        long = power_prototype(a_RK, b_NR, seed)
    assert float((delta @ long.double()).norm() / top) > 0.99
    short = prototypes([(a_RK, b_NR), (2 * a_RK, b_NR)], seed)
    assert short.shape == (2, width)
    assert (short[0] - short[1]).abs().max() < 1e-4


def test_an_expert_that_adds_nothing_has_no_direction():
    a_RK, b_NR = torch.ones(2, 5), torch.zeros(7, 2)
    assert torch.equal(svd_prototype(a_RK, b_NR), torch.zeros(5))
    assert torch.equal(power_prototype(a_RK, b_NR, 0), torch.zeros(5))


def test_svd_is_another_router_than_peft_has(bases, tmp_path):
    power = load_adapter(write_arrow(tmp_path / "p", 2, r=6))
    exact = load_adapter(write_arrow(tmp_path / "s", 2, r=6, prototypes="svd", rng_seed=None))
    cosines = torch.stack([
        (power.modules[n].router_GK * exact.modules[n].router_GK).sum(-1).abs()
        for n in power.modules
    ])  # fmt: skip
    model = bases["base_llama"]
    apart = (logits_with(power, model) - logits_with(exact, model)).abs().mean().item()
    print(f"|cos| of 15 steps and the singular vector: {cosines.min():.2f} to {cosines.max():.4f},"
          f" mean |dlogit| {apart:.3f}")  # fmt: skip
    assert cosines.min() < 0.95
    assert apart > 0.01


def side(**change):
    return with_json(lambda c: c.update(change), SIDE)


def unset(key):
    return with_json(lambda c: c.pop(key), SIDE)


def inner(build, name):
    """A builder that changes one expert of a good folder."""

    def change(dst, good):
        side()(dst, good)
        build(dst / name, dst / name)

    return change


def inner_at(build, name):
    """The same for a folder that is already a copy."""
    return lambda dst, good: build(dst / name, dst / name)


def both(*builds):
    def change(dst, good):
        builds[0](dst, good)
        for build in builds[1:]:
            build(dst, dst)

    return change


def without_sidecar(dst, good):
    side()(dst, good)
    (dst / SIDE).unlink()


def without_weights(dst, good):
    side()(dst, good)
    (dst / "task_1/adapter_model.safetensors").unlink()


BAD = {
    "no_sidecar": (without_sidecar, "missing_setting", "gks_0.*task_0.*task_1.*task_2"),
    "no_names": (unset("task_adapter_names"), "missing_setting", "task_0.*task_1"),
    "no_k": (unset("top_k"), "missing_setting", "top_k"),
    "no_temperature": (unset("router_temperature"), "missing_setting", "router_temperature"),
    "no_seed": (unset("rng_seed"), "missing_setting", "svd"),
    "null_seed": (side(rng_seed=None), "missing_setting", "svd"),
    "svd_with_seed": (side(prototypes="svd"), "unknown_key", "rng_seed"),
    "seed_text": (side(rng_seed="1"), "bad_value", "rng_seed"),
    "seed_huge": (side(rng_seed=2**64), "bad_value", "rng_seed"),
    "mode": (side(prototypes="exact"), "bad_value", "prototypes"),
    "k_too_large": (side(top_k=4), "k_too_large", "top_k"),
    "k_zero": (side(top_k=0), "bad_gate", "'k'"),
    "cold": (side(router_temperature=0), "bad_gate", "temperature"),
    "two_temperatures": (side(temperature=2), "setting_mismatch", "temperature"),
    "two_orders": (side(expert_order=["task_0"]), "setting_mismatch", "expert_order"),
    "unknown_folder": (side(task_adapter_names=["task_0", "law"]), "missing_file", "law"),
    "outside": (side(task_adapter_names=["task_0", "../x"]), "missing_file", "x"),
    "twice": (side(task_adapter_names=["task_0", "task_0"]), "bad_value", "different"),
    "forgotten": (side(task_adapter_names=["task_0", "task_1"]), "setting_mismatch", "task_2"),
    "gks_forgotten": (unset("gks_adapter_names"), "setting_mismatch", "gks_0"),
    "gks_and_task": (side(gks_adapter_names=["gks_0", "task_0"]), "setting_mismatch", "task_0"),
    "gks_text": (side(use_gks="yes"), "bad_value", "use_gks"),
    "unknown_key": (side(expert_top_k=1), "unknown_key", "expert_top_k"),
    "no_weights": (without_weights, "missing_file", "task_1"),
    "dora": (inner(with_json(lambda c: c.update(use_dora=True)), "task_1"),
             "unsupported_feature", "task_1.*use_dora"),
    "not_lora": (inner(with_json(lambda c: c.update(peft_type="LOHA")), "task_1"),
                 "unsupported_feature", "task_1.*LOHA"),
    "layer_gone": (inner(with_tensors(lambda t: [t.pop(k) for k in list(t) if "q_proj" in k]),
                         "task_1"), "missing_tensor", "task_1.*q_proj"),
    "b_gone": (inner(with_tensors(lambda t: t.pop(min(k for k in t if "lora_B" in k))), "gks_0"),
               "missing_tensor", "gks_0.*lora_B"),
    "stranger": (inner(with_tensors(lambda t: t.update(x=torch.ones(2))), "task_1"),
                 "unexpected_tensor", "x"),
    "nan": (inner(with_tensors(lambda t: t[min(t)].fill_(float("nan"))), "gks_0"),
            "not_finite", "A"),
    "nan_svd": (both(unset("rng_seed"), side(prototypes="svd"), inner_at(
        with_tensors(lambda t: t[min(t)].fill_(float("nan"))), "task_0")), "not_finite", "A"),
    "narrow": (inner(with_tensors(lambda t: t.update({k: t[k][:, :-1] for k in t
                                                      if "lora_A" in k})), "task_1"),
               "bad_shape", "task_1"),
    "short": (inner(with_tensors(lambda t: t.update({k: t[k][:-1] for k in t
                                                     if "lora_B" in k})), "gks_0"),
              "bad_shape", "gks_0"),
    "other_base": (inner(with_json(lambda c: c.update(base_model_name_or_path="gpt")), "task_1"),
                   "setting_mismatch", "gpt"),
    "embedding": (inner(with_tensors(lambda t: t.update({
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 512),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(128, 3)})), "task_1"),
        "unsupported_feature", "task_1.*embed"),
    "off_and_named": (both(side(use_gks=False), side(gks_adapter_names=["gks_1"])),
                      "missing_file", "gks_1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_arrow(
        tmp_path_factory.mktemp("arrow") / "good", 7, experts=3, general=1, layers=[0]
    )


@pytest.mark.parametrize("name", BAD)
def test_broken_folders_are_refused(name, good, tmp_path):
    build, code, text = BAD[name]
    build(tmp_path / "bad", good)
    with pytest.raises(AdapterError, match=rf"(?s){text}") as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == code, caught.value.text
    assert len(caught.value.text) < 1500


def test_what_trainers_leave_beside_the_experts(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "a")
    want = load_adapter(folder).digest
    for name in ("training_args.bin", "optimizer.pt", "value_head.safetensors"):
        (folder / name).write_bytes(b"not for us")
    assert load_adapter(folder).digest == want
    (folder / "adapter_model.bin").write_bytes(b"for us")
    with pytest.raises(AdapterError, match="pickle_refused"):
        load_adapter(folder)


def test_gks_named_and_switched_off(good, tmp_path):
    both(side(use_gks=False))(tmp_path / "off", good)
    module = load_adapter(tmp_path / "off").modules["model.layers.0.self_attn.q_proj"]
    single = load_adapter(good / "task_0").modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(module.a_RK[:3], single.a_RK)


def test_general_adapters_of_another_rank(good, tmp_path):
    side()(tmp_path / "bad", good)
    write_plain(tmp_path / "bad/gks_0", 1, r=4, layers=[0])
    with pytest.raises(AdapterError, match="subtracted") as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == "rank_mismatch"


@pytest.mark.parametrize(("junk", "code"), [
    ({"top_k": 2, "moon": 1}, "unknown_key"), ("on", "bad_value"), ([1], "bad_value"),
    ({"task_adapter_names": "task_0"}, "bad_value"), ({"top_k": 2}, "missing_setting"),
])  # fmt: skip
def test_junk_in_arrow_config(junk, code, good, tmp_path):
    side()(tmp_path / "bad", good)
    (tmp_path / "bad" / SIDE).unlink()
    config = json.loads((good / "task_0/adapter_config.json").read_text())
    (tmp_path / "bad/adapter_config.json").write_text(json.dumps(config | {"arrow_config": junk}))
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == code


def test_a_sidecar_may_not_contradict_arrow_config(good, tmp_path):
    side()(tmp_path / "bad", good)
    config = json.loads((good / "task_0/adapter_config.json").read_text())
    config["arrow_config"] = {"top_k": 1}
    (tmp_path / "bad/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="top_k") as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == "setting_mismatch"
