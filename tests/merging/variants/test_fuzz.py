"""Broken artefacts of every family: a typed error or a finite adapter, never anything else."""

from __future__ import annotations

import contextlib
import json
import shutil

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import FORMATS, load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.variants import read_variant

T = ["q_proj", "down_proj"]
CONFIGS = {
    "adalora": peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=T),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=T),
    "lokr": peft.LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=T),
    "vera": peft.VeraConfig(r=3, target_modules=T),
    "vblora": peft.VBLoRAConfig(
        r=2, num_vectors=5, vector_length=12, topk=2, save_only_topk_weights=True, target_modules=T
    ),
    "delora": peft.DeloraConfig(r=2, target_modules=T),
    "miss": peft.MissConfig(r=5, target_modules=T),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, target_modules=T),
    "fourierft": peft.FourierFTConfig(n_frequency=5, target_modules=T),
    "c3a": peft.C3AConfig(block_size=6, target_modules=T),
    "randlora": peft.RandLoraConfig(r=5, target_modules=T),
    "pvera": peft.PveraConfig(r=3, target_modules=T),
    "unilora": peft.UniLoraConfig(r=2, theta_d_length=9, save_indices=True, target_modules=T),
    "hra": peft.HRAConfig(r=3, target_modules=T),
    "hira": peft.HiraConfig(r=3, target_modules=T),
    "ia3": peft.IA3Config(target_modules=T, feedforward_modules=["down_proj"]),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=T),
    "miss_bat": peft.MissConfig(r=6, init_weights="bat", target_modules=T),
}
JUNK = st.sampled_from([None, -1, 0, 1, 3, 10**30, 0.5, "x", [], ["x"], {}, {"q_proj": 1}, True])
SHAPES = st.lists(st.integers(0, 7), max_size=4)


@pytest.fixture(scope="module")
def folders(make_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("artefacts")
    for name, config in CONFIGS.items():
        tuned = peft.get_peft_model(make_base(), config)
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.copy_(torch.rand_like(weight) + 0.1)
        tuned.save_pretrained(root / name)
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_only_typed_errors(name, folders, base_dir, tmp_path, data):
    broken = tmp_path / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(folders / name, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    config = json.loads((broken / "adapter_config.json").read_text())
    victim = data.draw(st.sampled_from(sorted(tensors)))
    key = data.draw(st.sampled_from(sorted(set(config) - {"peft_type"})))
    match data.draw(st.sampled_from(["drop", "shape", "dtype", "key", "value", "nan"])):
        case "drop":
            del tensors[victim]
        case "shape":
            tensors[victim] = torch.ones(data.draw(SHAPES))
        case "dtype":
            kinds = [torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16]
            tensors[victim] = tensors[victim].to(data.draw(st.sampled_from(kinds)))
        case "key":
            del config[key]
        case "value":
            config[key] = data.draw(JUNK)
        case "nan":
            tensors[victim] = torch.full_like(tensors[victim].float(), float("nan"))
    save_file(tensors, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    try:
        got = read_variant(broken, base=base_dir, rank=48)
    except AdapterError:
        pass
    else:
        for pair in got.factors.modules.values():
            assert pair.delta().isfinite().all()
    if any(row.name == name and row.status == "served" for row in FORMATS):
        with contextlib.suppress(AdapterError):
            load_adapter(broken, settings={"sizes": {"q_proj": [48, 48], "down_proj": [84, 48]}})
