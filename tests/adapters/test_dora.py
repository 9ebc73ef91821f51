"""DoRA folders against PEFT, and what is refused of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.dora_folders import make
from tests.peft_folders import CONFIG, IDS, WEIGHTS, assert_serves, set_config
from vllm_lora_ext.adapters import check_adapter, load_adapter, write_native
from vllm_lora_ext.adapters.dora import refuse_dora, scale_of
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors
from vllm_lora_ext.routing import GateSpec

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "rslora": {"use_rslora": True, "r": 9},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"down_proj": 11},
    },
    "some": {"target_modules": ["v_proj", "o_proj"]},
}


def code(call: Any, *args: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        call(*args)
    return caught.value.code


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["base_llama", "base_qwen2"])
def test_equals_peft(bases: Any, name: str, case: str, tmp_path: Path) -> None:
    """Qwen2 has biases on q, k and v: they are not rescaled."""
    base = bases[name]
    want = make(tmp_path, base, **CASES[case])(IDS % 300).logits
    adapter = load_adapter(tmp_path)
    assert adapter.dora == list(adapter.modules)
    plain = base(IDS % 300).logits
    with apply_adapter(base, adapter):
        got = base(IDS % 300).logits
    assert (want - plain).abs().mean() > 0.02
    assert (got - want).abs().max() < 2e-4
    assert torch.equal(base(IDS % 300).logits, plain)


def test_biases_stay_as_they_are(bases: Any, tmp_path: Path) -> None:
    """Of every size, on every layer that has one."""
    base = copy.deepcopy(bases["base_qwen2"])
    for name, parameter in base.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    want = make(tmp_path, base)(IDS % 300).logits
    with apply_adapter(base, load_adapter(tmp_path)):
        assert (base(IDS % 300).logits - want).abs().max() < 2e-4


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    base = GPT2LMHeadModel(config).eval()
    model = make(tmp_path, base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert_serves(tmp_path, base, model(IDS).logits, close=1e-4)


@pytest.mark.parametrize("spelling", ["{}", "{}.default", "{}.default.weight", "{}.weight"])
def test_spellings_of_the_vectors(bases: Any, spelling: str, tmp_path: Path) -> None:
    make(tmp_path, bases["base_llama"], target_modules=["v_proj"])
    want = load_adapter(tmp_path).modules
    tensors = load_file(tmp_path / WEIGHTS)
    named = {spelling.format(n) if "magnitude" in n else n: t for n, t in tensors.items()}
    save_file(named, tmp_path / WEIGHTS)
    got = load_adapter(tmp_path).modules
    assert all(torch.equal(got[n].magnitude_N, want[n].magnitude_N) for n in want)


def test_the_native_format_keeps_them(bases: Any, tmp_path: Path) -> None:
    make(tmp_path / "peft", bases["base_llama"], target_modules=["v_proj"])
    adapter = load_adapter(tmp_path / "peft")
    copied = load_adapter(write_native(adapter, tmp_path / "native", torch.bfloat16))
    for name, module in adapter.modules.items():
        assert torch.equal(copied.modules[name].magnitude_N, module.magnitude_N)


def change(folder: Path, edit: Any) -> Path:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


MAGNITUDE = "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector"
BAD: dict[str, tuple[str, Any]] = {
    "one is missing": ("missing_tensor", lambda t: t.pop(MAGNITUDE)),
    "another shape": ("bad_shape", lambda t: t.update({MAGNITUDE: torch.ones(3)})),
    "NaN": ("not_finite", lambda t: t[MAGNITUDE].fill_(float("nan"))),
    "of no layer": (
        "unexpected_tensor", lambda t: t.update({"x.lora_magnitude_vector": torch.ones(3)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_broken_folder_is_refused(bases: Any, case: str, tmp_path: Path) -> None:
    want, edit = BAD[case]
    make(tmp_path, bases["base_llama"], target_modules=["v_proj"])
    assert code(load_adapter, change(tmp_path, edit)) == want


def test_vectors_that_the_config_does_not_know(bases: Any, tmp_path: Path) -> None:
    make(tmp_path, bases["base_llama"], target_modules=["v_proj"])
    assert code(load_adapter, set_config(tmp_path, use_dora=False)) == "unsupported_feature"


def test_what_dora_is_not_served_on(bases: Any, tmp_path: Path) -> None:
    """An embedding, a part of the prompt, a merge, a mixture."""
    folder = tmp_path / "embedding"
    make(folder, bases["base_llama"], target_modules=["embed_tokens", "v_proj"])
    assert code(load_adapter, folder) == "unsupported_feature"
    folder = tmp_path / "linear"
    make(folder, bases["base_llama"], target_modules=["v_proj"])
    assert code(load_factors, folder) == "unsupported_feature"
    adapter = load_adapter(folder)
    assert code(refuse_dora, adapter, "merged") == "unsupported_feature"
    gate = GateSpec(source="position", blocks=(4,))
    gated = {name: replace(m, gate=gate) for name, m in adapter.modules.items()}
    assert code(check_adapter, replace(adapter, modules=gated)) in (
        "bad_gate",
        "unsupported_feature",
    )
    config = json.loads((folder / CONFIG).read_text()) | {"alora_invocation_tokens": [5, 6]}
    (folder / CONFIG).write_text(json.dumps(config))
    assert code(load_adapter, folder) == "unsupported_feature"


def test_a_row_of_zeros_has_no_direction() -> None:
    assert code(scale_of, "q_proj", torch.ones(2), torch.tensor([1.0, 0.0])) == "not_finite"
    assert scale_of("q", torch.tensor([3.0, 0.0]), torch.tensor([4.0, 1.0])).tolist() == [1.5, 0]
