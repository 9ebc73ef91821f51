"""The plain reader against PEFT itself, on the tiny Llama."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from make_adapters import FIXTURES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.errors import AdapterError

IDS = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(0))
CASES = {
    "one_module": {"target_modules": ["q_proj"]},
    "all_linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 3.5},
    "rslora": {"target_modules": ["v_proj", "down_proj"], "r": 9, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 3, r"layers\.[12]\.mlp\.up_proj": 5, "proj": 7},
        "alpha_pattern": {r".*\.0\.self_attn\.o_proj": 40, "^model.layers.1.self_attn.o_proj": 2},
    },
    "patterns_rslora": {
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "gate_proj": 12},
        "alpha_pattern": {"q_proj": 32},
        "use_rslora": True,
    },
    "embedding": {"target_modules": ["embed_tokens", "k_proj"], "r": 5},
    "lm_head": {"target_modules": ["lm_head", "k_proj"], "r": 5},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "init": {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
}


@pytest.fixture
def base(bases):
    """A copy of its own: PEFT wraps a model for good."""
    return copy.deepcopy(bases["base_llama"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case, base, bases, tmp_path):
    settings = {"r": 8, "lora_alpha": 16} | CASES[case]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.15
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    plain = bases["base_llama"](IDS).logits
    with apply_adapter(bases["base_llama"], adapter):
        got = bases["base_llama"](IDS).logits
    moved, error = (want - plain).abs().mean().item(), (got - want).abs().max().item()
    print(f"{case}: mean |dlogit| {moved:.2f}, largest difference from PEFT {error:.1e}")
    assert moved > 0.02
    assert error < 5e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("lora_bias", {"lora_bias": True}),
        ("bias", {"bias": "lora_only"}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("init_lora_weights", {"init_lora_weights": "olora"}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
        ("layer_replication", {"layer_replication": [[0, 2], [1, 3]]}),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(key, settings, base, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=key) as caught:
        load_adapter(tmp_path)
    assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my_adapter.weight"),
    ],
)
def test_other_spellings_of_names(change, tmp_path):
    good = FIXTURES / "routed/plain-a/adapter"
    tensors = load_file(good / "adapter_model.safetensors")
    save_file({change(n): t for n, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
    got, want = load_adapter(tmp_path).modules, load_adapter(good).modules
    assert set(got) == set(want)
    assert all(torch.equal(got[n].a_RK, want[n].a_RK) for n in want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_scaled_in_fp32(dtype, tmp_path):
    good = FIXTURES / "routed/plain-a/adapter"
    config = json.loads((good / "adapter_config.json").read_text()) | {"lora_alpha": 11}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(good / "adapter_model.safetensors")
    half = {name: t.to(dtype) for name, t in tensors.items()}
    save_file(half, tmp_path / "adapter_model.safetensors")
    module = load_adapter(tmp_path).modules["model.layers.0.mlp.up_proj"]
    stored = half["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert module.b_NR.dtype == torch.float32
    assert torch.equal(module.b_NR, stored.float() * (11 / 8))
