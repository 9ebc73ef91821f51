"""Folders of routed systems with something wrong: the right error, never another reading."""

from __future__ import annotations

import json

import make_routed as make
import pytest
import torch
from bad_adapters import with_json, with_tensors
from make_formats import write_mixlora
from safetensors.torch import load_file

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError

CONFIG, SIDE = "adapter_config.json", "routing.json"
FIELDS = ("a_RK", "b_NR", "router_GK", "bias_G", "head_K")


def same(one, two):
    if set(one.modules) != set(two.modules):
        return False
    for name, module in one.modules.items():
        other = two.modules[name]
        if (module.gate, module.head_bias) != (other.gate, other.head_bias):
            return False
        for field in FIELDS:
            a, b = getattr(module, field), getattr(other, field)
            if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
                return False
    return True


def code_or_same(folder, good):
    """The error's code, or `same`. Anything else fails."""
    try:
        adapter = load_adapter(folder)
    except AdapterError as error:
        assert "fix: " in error.text
        assert len(error.text) < 2000, error.text
        return error.code
    assert same(adapter, good), "loaded as something else"
    return "same"


@pytest.fixture(params=make.WRITERS)
def folder(request, tmp_path):
    """One layer: what is gone has no copy in another one."""
    writer = make.WRITERS[request.param]
    return writer(tmp_path / request.param, 5, targets=("up_proj",), layers=(1,))


def test_every_tensor_is_missed(folder):
    good = load_adapter(folder)
    for name in load_file(folder / "adapter_model.safetensors"):
        bad = folder.parent / "bad"
        with_tensors(lambda tensors, name=name: tensors.pop(name))(bad, folder)
        wanted = "same" if "moe_layer" in name else "missing_tensor"
        assert code_or_same(bad, good) == wanted, name


def test_every_key_is_missed_or_of_no_effect(folder):
    good = load_adapter(folder)
    for file in (CONFIG, SIDE):
        keys = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        for key in keys:
            bad = folder.parent / "bad"
            with_json(lambda config, key=key: config.pop(key), file)(bad, folder)
            code_or_same(bad, good)
            (bad / file).write_text((folder / file).read_text())


def test_every_other_peft_type_is_refused(folder):
    good = load_adapter(folder)
    own = json.loads((folder / CONFIG).read_text())["peft_type"]
    for other in ("LORA", "SRMOLE", "ADAMOLE", "MOLE", "LORAMOE", "MOLA", "MIXLORA", "ROUTED_LORA"):
        if other != own:
            bad = folder.parent / "bad"
            with_json(lambda config, other=other: config.update(peft_type=other))(bad, folder)
            assert code_or_same(bad, good) != "same", other


# system, shape, file or None for the tensors, change, code, a word of the message
REFUSED = {
    "rank_pattern of smora": (
        "smora", {}, CONFIG, {"rank_pattern": {"q_proj": 3}}, "unsupported_feature", "rank_pattern",
    ),
    "partition that does not divide": (
        "smora", {}, CONFIG, {"rank_partition": 5}, "bad_value", "rank_partition",
    ),
    "other partition": ("smora", {}, CONFIG, {"rank_partition": 3}, "bad_shape", "router"),
    "more active than ranks": (
        "smora", {}, CONFIG, {"activate_r": 13}, "k_too_large", "activate_r",
    ),
    "fly: k above r": ("flylora", {}, CONFIG, {"top_k": 12}, "k_too_large", "top_k"),
    "fly: lost rsLoRA": ("flylora", {}, CONFIG, {"use_rslora": None}, "missing_key", "use_rslora"),
    "fly: lost pattern": (
        "flylora", {}, CONFIG, {"rank_pattern": None}, "missing_key", "rank_pattern",
    ),
    "fly: lost select": ("flylora", {}, SIDE, {"select": None}, "missing_setting", "select"),
    "fly: odd select": ("flylora", {}, SIDE, {"select": "magnitude"}, "bad_value", "select"),
    "moram: lost tau": ("moram", {}, SIDE, {"tau": None}, "missing_setting", "tau"),
    "moram: tau 0": ("moram", {}, SIDE, {"tau": 0}, "bad_value", "tau"),
    "moram: delta below 0": ("moram", {}, SIDE, {"delta": -0.1}, "bad_value", "delta"),
    "moram: lost k": ("moram", {}, SIDE, {"top_k": None}, "missing_setting", "top_k"),
    "moram: two ks": (
        "moram", {"moram_topk": 3}, SIDE, {"top_k": 4}, "setting_mismatch", "moram_topk",
    ),
    "moram: off": ("moram", {}, CONFIG, {"use_moram": False}, "unsupported_feature", "use_moram"),
    "moram: other bank": ("moram", {}, CONFIG, {"r_sum": 8}, "rank_mismatch", "lora_A"),
    "moram: bank only, off": (
        "moram", {"fresh": False}, CONFIG, {"use_moram": None}, "unsupported_feature", "MoRAM",
    ),
    "mola: number of experts": (
        "mola", {}, SIDE, {"number_experts": [3, 3, 5]}, "setting_mismatch", "number_experts",
    ),
    "mola: too few layers": (
        "mola", {}, SIDE, {"number_experts": [3, 2]}, "setting_mismatch", "number_experts",
    ),
    "mola: lost k": ("mola", {}, SIDE, {"top_k": None}, "missing_setting", "top_k"),
    "mola: k above E": ("mola", {}, SIDE, {"top_k": 3}, "k_too_large", "top_k"),
    "mola: k is true": ("mola", {}, SIDE, {"top_k": True}, "bad_value", "top_k"),
    "mola: short r": ("mola", {}, CONFIG, {"r": [2, 3]}, "setting_mismatch", "top_k"),
    "mola: one r": ("mola", {}, CONFIG, {"r": 2}, "bad_value", "r in"),
    "mola: other r": ("mola", {}, CONFIG, {"r": [2, 1, 1]}, "rank_mismatch", "lora_A_0"),
    "hydra: more experts": ("hydralora", {}, CONFIG, {"lora_nums": 6}, "missing_tensor", "lora_B5"),
    "hydra: rsLoRA": (
        "hydralora", {}, CONFIG, {"use_rslora": True}, "unsupported_feature", "use_rslora",
    ),
    "hydra: fewer experts": (
        "hydralora", {}, CONFIG, {"lora_nums": 4}, "unexpected_tensor", "lora_B4",
    ),
    "ada: lost maximum": (
        "adamole", {}, CONFIG, {"max_threshold": None}, "missing_key", "max_threshold",
    ),
    "ada: r for lora_rank": ("adamole", {}, CONFIG, {"r": 3}, "unknown_key", "lora_rank"),
    "ada: alpha_pattern": (
        "adamole", {}, CONFIG, {"alpha_pattern": {"q_proj": 1}}, "unsupported_feature",
        "alpha_pattern",
    ),
    "mole: both": ("mole", {}, CONFIG, {"threshold": 0.2}, "bad_value", "threshold"),
    "mole: neither": ("mole", {}, CONFIG, {"top_k": None}, "missing_key", "top_k"),
    "moe_peft: other strategy": (
        "mola_moepeft", {}, CONFIG, {"routing_strategy": "mixlora"}, "bad_value",
        "routing_strategy",
    ),
    "moe_peft: lost k": ("mola_moepeft", {}, CONFIG, {"top_k": None}, "missing_key", "top_k"),
    "moe_peft: DoRA": (
        "loramoe_moepeft", {}, CONFIG, {"use_dora": True}, "unsupported_feature",
        "magnitudes.*not among the saved tensors",
    ),
    "mola: DoRA": (
        "mola_moepeft", {}, CONFIG, {"use_dora": True}, "unsupported_feature",
        "magnitudes.*not among the saved tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_mixlora_with_dora_is_refused(nested, tmp_path):
    folder = write_mixlora(tmp_path / "a", 5)
    key = {"expert_lora": {"use_dora": True}} if nested else {"use_dora": True}
    with_json(lambda c: c.update(key), CONFIG)(folder, folder)
    with pytest.raises(AdapterError, match=r"magnitudes.*not among the saved tensors") as caught:
        load_adapter(folder)
    assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case, tmp_path):
    system, shape, file, change, code, word = REFUSED[case]
    folder = make.WRITERS[system](tmp_path / "a", 5, **shape)

    def apply(config):
        for key, value in change.items():
            config.pop(key, None) if value is None else config.update({key: value})

    with_json(apply, file)(folder, folder)
    with pytest.raises(AdapterError, match=word) as caught:
        load_adapter(folder)
    assert caught.value.code == code, caught.value.text


def test_a_copy_of_an_expert_must_be_equal(tmp_path):
    folder = make.write_adamole(tmp_path / "a", 5)

    def change(tensors):
        name = next(n for n in tensors if "moe_layer.experts.2.lora_B" in n)
        tensors[name] = 2 * tensors[name]

    with_tensors(change)(folder, folder)
    with pytest.raises(AdapterError, match=r"moe_layer\.experts\.2\.lora_B") as caught:
        load_adapter(folder)
    assert caught.value.code == "duplicate_tensor"


def test_two_systems_in_one_folder_are_ambiguous(tmp_path):
    folder = make.write_flylora(tmp_path / "a", 5)
    name = "base_model.model.model.layers.0.self_attn.q_proj.loranew_A.weight"
    with_tensors(lambda tensors: tensors.update({name: torch.ones(2, 128)}))(folder, folder)
    with pytest.raises(AdapterError, match=r"flylora.*moram") as caught:
        load_adapter(folder)
    assert caught.value.code == "ambiguous_format"


def test_the_older_name_of_use_moram(tmp_path):
    folder = make.write_moram(tmp_path / "a", 5)
    good = load_adapter(folder)
    with_json(lambda c: c.update(use_moram=False, use_mora=True))(folder, folder)
    assert same(load_adapter(folder), good)
