"""MOELoRA and Poly: an ordinary LoRA per task id. Also the formats that are refused by name."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from bad_adapters import with_json, with_tensors
from make_adapters import FIXTURES
from make_multi import write_moelora, write_poly
from peft import LilyConfig, PeftModel, PolyConfig, get_peft_model
from safetensors.torch import load_file

from tests.adapters.test_fixtures import fixture, largest_error
from vllm_lora_ext.adapters import FORMATS, load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.errors import AdapterError

FIXTURE_NAMES = ["moelora-a", "moelora-perlayer"]
SIDE = "routing.json"
IDS = torch.randint(4, 380, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_reproduces_the_recorded_logits(name, bases, tmp_path):
    path, meta, expected = fixture(name)
    adapter = load_adapter(path)
    assert (adapter.system, adapter.rank) == (meta["system"], meta["total_rank"])
    assert all(module.gate.source == "none" for module in adapter.modules.values())
    error = largest_error(bases[meta["base"]], adapter, expected)
    print(f"{name}: largest |dlogit| {error:.1e}")
    assert error < 1e-4
    copy = load_adapter(write_native(adapter, tmp_path / "copy"))
    assert largest_error(bases[meta["base"]], copy, expected) < 1e-4


def test_reproduces_the_logits_of_another_task(bases, tmp_path):
    path, meta, expected = fixture("moelora-a")
    others = {name: t for name, t in expected.items() if name.startswith("logits_task")}
    assert others
    shutil.copytree(path, tmp_path, dirs_exist_ok=True, ignore=lambda *_: [SIDE])
    model = bases[meta["base"]]
    for name, want in others.items():
        task = int(name.removeprefix("logits_task").removesuffix("_1"))
        with apply_adapter(model, load_adapter(tmp_path, settings={"task_id": task})):
            got = model(expected["prompt_1"][None]).logits[0]
        print(f"{name}: largest |dlogit| {(got - want).abs().max():.1e}")
        assert (got - want).abs().max() < 1e-4
        assert (want - expected["logits_1"]).abs().max() > 0.1


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize(
    ("base", "shape", "tasks"),
    [
        ("base_llama", {"experts": 1, "expert_rank": 5, "tasks": 1, "width": 3}, (0, 1)),
        ("base_qwen2", {"experts": 7, "expert_rank": 1, "tasks": 4, "alpha": 5.5}, (0, 3, 4)),
        ("base_qwen2", {"experts": 3, "expert_rank": 4, "width": 17, "layers": [1]}, (2,)),
    ],
)
def test_moelora_is_the_weighted_sum(per_module, base, shape, tasks, tmp_path):
    folder = write_moelora(tmp_path, 4, base, per_module=per_module, **shape)
    stored = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for task in tasks:
        (folder / SIDE).write_text(json.dumps({"task_id": task}))
        for name, module in load_adapter(folder).modules.items():
            stem = f"base_model.model.{name}."
            gate = stem if per_module else ""
            logits = (
                stored[f"{gate}lora_gate.GateL.weight"]
                @ (stored[f"{gate}lora_task_embedding.weight"][task])
            )
            want = torch.zeros_like(module.b_NR @ module.a_RK)
            for e, weight in enumerate(logits.exp() / logits.exp().sum()):
                a_RK = stored[f"{stem}lora_A.loraA.{e}.mlp.weight"]
                b_NR = stored[f"{stem}lora_B.loraB.{e}.mlp.weight"]
                want += weight * config["lora_alpha"] / config["r"] * (b_NR @ a_RK)
            assert (module.b_NR @ module.a_RK - want).abs().max() < 1e-6
            assert want.abs().max() > 0.01


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("base", ["base_llama", "base_qwen2"])
def test_poly_equals_peft(base, splits, bases, tmp_path):
    shape = {"r": 3, "tasks": 4, "skills": 1 + splits, "splits": splits}
    folder = write_poly(tmp_path, splits, base, targets=("q_proj", "down_proj"), **shape)
    model = PeftModel.from_pretrained(copy.deepcopy(bases[base]), folder).eval()
    for task in (0, 3):
        want = model(input_ids=IDS, task_ids=torch.tensor([task])).logits
        (folder / SIDE).write_text(json.dumps({"task_id": task}))
        with apply_adapter(bases[base], load_adapter(folder)):
            got = bases[base](IDS).logits
        moved = (want - bases[base](IDS).logits).abs().mean().item()
        error = (got - want).abs().max().item()
        print(f"poly, {splits} splits, task {task}: moved {moved:.2f}, difference {error:.1e}")
        assert moved > 0.02
        assert error < 1e-4


def test_poly_as_peft_itself_saves_it(bases, tmp_path):
    config = PolyConfig(
        task_type="CAUSAL_LM", r=4, n_tasks=2, n_skills=3, n_splits=2, init_weights=False,
        target_modules=["v_proj"],
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(bases["base_llama"]), config).eval()
    model.save_pretrained(tmp_path)
    want = model(input_ids=IDS, task_ids=torch.tensor([1])).logits
    with apply_adapter(bases["base_llama"], load_adapter(tmp_path, settings={"task_id": 1})):
        assert (bases["base_llama"](IDS).logits - want).abs().max() < 1e-4


def poke(name, value):
    """A change that adds to the first entry of the one tensor whose name holds `name`."""

    def change(tensors):
        found = next(key for key in sorted(tensors) if name in key)
        tensors[found].view(-1)[0] += value

    return with_tensors(change)


def drop(name):
    return with_tensors(lambda t: t.pop(next(key for key in sorted(t) if name in key)))


def cut(name):
    """All tensors whose name holds `name` lose a row: an expert and its second copy."""

    def change(tensors):
        for found in [key for key in tensors if name in key]:
            tensors[found] = tensors[found][:-1].clone()

    return with_tensors(change)


MOELORA_BAD = {
    "no_task": (with_json(lambda c: c.clear(), SIDE), "missing_setting"),
    "task_too_large": (with_json(lambda c: c.update(task_id=3), SIDE), "bad_value"),
    "task_negative": (with_json(lambda c: c.update(task_id=-1), SIDE), "bad_value"),
    "task_text": (with_json(lambda c: c.update(task_id="1"), SIDE), "bad_value"),
    "unknown_setting": (with_json(lambda c: c.update(top_k=1), SIDE), "unknown_key"),
    "copies_differ": (poke("loraA.0.weight", 1), "duplicate_tensor"),
    "expert_gone": (drop("loraB.1.mlp"), "missing_tensor"),
    "expert_cut": (cut("loraA.1."), "rank_mismatch"),
    "tasks_wrong": (with_json(lambda c: c.update(task_num=5)), "bad_shape"),
    "width_wrong": (with_json(lambda c: c.update(task_embedding_dim=5)), "bad_shape"),
    "experts_do_not_divide": (with_json(lambda c: c.update(expert_num=5)), "rank_mismatch"),
    "experts_fewer": (with_json(lambda c: c.update(expert_num=2)), "bad_shape"),
    "no_expert_num": (with_json(lambda c: c.pop("expert_num")), "missing_key"),
    "rslora": (with_json(lambda c: c.update(use_rslora=True)), "unsupported_feature"),
    "stranger": (with_tensors(lambda t: t.update({"x.lora_route.weight": torch.ones(2, 2)})),
                 "unexpected_tensor"),
}  # fmt: skip


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("name", MOELORA_BAD)
def test_broken_moelora_is_refused(name, per_module, tmp_path):
    good = write_moelora(tmp_path / "good", 1, per_module=per_module, layers=[0])
    build, code = MOELORA_BAD[name]
    build(tmp_path / "bad", good)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == code, caught.value.text


def test_the_two_layouts_of_moelora_are_not_confused(tmp_path):
    good = write_moelora(tmp_path / "good", 1, layers=[0])
    drop("lora_gate.GateL")(tmp_path / "a", good)  # a dead copy: same adapter
    drop("loraA.0.weight")(tmp_path / "b", good)  # the second copy of an expert: same adapter
    want = load_adapter(good).modules
    for folder in ("a", "b"):
        got = load_adapter(tmp_path / folder).modules
        assert all(torch.equal(got[n].b_NR, want[n].b_NR) for n in want)
    with_json(lambda c: c.update(peft_type="MMOELORA"))(tmp_path / "c", good)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "c")
    assert caught.value.code == "unexpected_tensor"  # the top-level gate would go unread
    per_module = write_moelora(tmp_path / "good2", 1, per_module=True, layers=[0])
    with_json(lambda c: c.update(peft_type="MMOELORAS"))(tmp_path / "d", per_module)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "d")
    assert caught.value.code == "missing_tensor"


POLY_BAD = {
    "no_task": (with_json(lambda c: c.clear(), SIDE), "missing_setting"),
    "task_too_large": (with_json(lambda c: c.update(task_id=3), SIDE), "bad_value"),
    "kind": (with_json(lambda c: c.update(poly_type="x")), "unsupported_feature"),
    "splits": (with_json(lambda c: c.update(n_splits=1)), "bad_shape"),
    "skills": (with_json(lambda c: c.update(n_skills=4)), "bad_shape"),
    "rank": (with_json(lambda c: c.update(r=4)), "bad_shape"),
    "no_rank": (with_json(lambda c: c.pop("r")), "missing_key"),
    "a_gone": (drop("poly_lora_A"), "missing_tensor"),
    "a_cut": (cut("poly_lora_A"), "bad_shape"),
    "router_cut": (cut("module_logits"), "bad_shape"),
}


@pytest.mark.parametrize("name", POLY_BAD)
def test_broken_poly_is_refused(name, tmp_path):
    good = write_poly(tmp_path / "good", 1, layers=[0], splits=2)
    build, code = POLY_BAD[name]
    build(tmp_path / "bad", good)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "bad")
    assert caught.value.code == code, caught.value.text


def test_lily_is_refused_with_the_reason(bases, tmp_path):
    config = LilyConfig(task_type="CAUSAL_LM", r=4, num_B=2, stride_A=1, target_modules=["q_proj"])
    get_peft_model(copy.deepcopy(bases["base_llama"]), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"Lily.*averaged over every token") as caught:
        load_adapter(tmp_path)
    assert caught.value.code == "unsupported_feature"


def test_a_strange_file_under_that_name_is_no_adapter(tmp_path):
    good = FIXTURES / "routed/plain-a/adapter"
    shutil.copy(good / "adapter_config.json", tmp_path)
    shutil.copy(good / "adapter_model.safetensors", tmp_path / "xlora_classifier.safetensors")
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert caught.value.code == "unexpected_file"


@pytest.mark.parametrize("name", ["moelora", "poly", "arrow", "lora_mixer", "xlora", "lily"])
def test_the_pages_have_something_to_say(name):
    reader = next(reader for reader in FORMATS if reader.name == name)
    assert reader.paper and reader.summary and reader.formula and reader.traps
    assert bool(reader.refused) == (name == "lily")
