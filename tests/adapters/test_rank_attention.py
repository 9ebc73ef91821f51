"""Adapters that attend to earlier A x: their files, an implementation of their own in transformers,
and who refuses them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from make_adapters import random_adapter
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors
from vllm_lora_ext.merging.routed import concat_routed
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.summary import summarise
from vllm_lora_ext.trace import record
from vllm_lora_ext.verify import engine_options

SPEC = GateSpec("attention", blocks=(3, 3))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(4, 40)[None]


class Attending(torch.nn.Module):
    """A linear layer with an adapter, which keeps keys and values from call to call."""

    def __init__(self, base, module):
        super().__init__()
        self.base, self.heads = base, module.gate.num_gates
        self.a, self.b = module.a_RK, module.b_NR
        self.q, self.k, self.v = module.attention_PR.chunk(3)
        self.keys, self.values = None, None

    def forward(self, x):
        z = x @ self.a.T
        q, k, v = (
            (z @ w.T).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        old = k.shape[2] - q.shape[2]
        scores += torch.full_like(scores, float("-inf")).triu(old + 1)
        o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.base(x) + (z + o) @ self.b.T


def attending_model(model, adapter):
    model = copy.deepcopy(model)
    for name, module in adapter.modules.items():
        parent, _, last = name.rpartition(".")
        base = getattr(model.get_submodule(parent), last)
        setattr(model.get_submodule(parent), last, Attending(base, module))
    return model


@pytest.fixture
def adapter(bases):
    return random_adapter(bases["base_llama"].config, 3, SPEC)


@pytest.fixture
def folder(adapter, tmp_path):
    return write_native(adapter, tmp_path / "native")


@torch.no_grad()
def test_against_an_implementation_of_its_own(adapter, bases):
    """Whole sequences here; there prompt and tokens, one after the other, with its cache."""
    model = bases["base_llama"]
    plain = model(IDS).logits
    with apply_adapter(model, adapter):
        want = model(IDS).logits
        both = model(torch.cat([IDS, IDS.flip(1)])).logits
    assert (want - plain).abs().mean() > 0.1
    torch.testing.assert_close(both[:1], want, atol=1e-5, rtol=1e-5)
    bare = replace(adapter, modules={n: replace(m, gate=GateSpec(), attention_PR=None)
                                     for n, m in adapter.modules.items()})  # fmt: skip
    with apply_adapter(model, bare):
        assert (model(IDS).logits - want).abs().mean() > 0.1, "attention matters"
    theirs = attending_model(model, adapter)
    whole = theirs(IDS[:, :20], use_cache=True)
    steps = [whole.logits]
    for token in IDS[0, 20:]:
        whole = theirs(token[None, None], past_key_values=whole.past_key_values, use_cache=True)
        steps.append(whole.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), want, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_kv_cache_of_transformers_has_no_room_for_it(adapter, bases):
    model = bases["base_llama"]
    with apply_adapter(model, adapter):
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(AdapterError, match="use_cache=False"):
            model(IDS[:, -1:], past_key_values=cache)


def test_files_and_back(adapter, folder):
    again = load_adapter(folder)
    assert again.attends == sorted(again.attends, key=list(again.modules).index)
    assert set(again.attends) == set(adapter.modules)
    for name, module in adapter.modules.items():
        mine = again.modules[name]
        assert mine.gate == module.gate and torch.equal(mine.attention_PR, module.attention_PR)
    said = {"heads": 2, "head_size": 32}
    text = summarise(again)["serve"]
    assert json.dumps({"lora_ext": {"rank_attention": said}}) in text
    options = engine_options("base", again, "float32", 512, 64)
    assert options["additional_config"] == {"lora_ext": {"rank_attention": said}}


def test_no_gates_to_show(adapter, bases):
    assert not record(bases["base_llama"], adapter, [5, 6, 7]).weights


def broken(folder, change):
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if n.endswith("attention.weight"))
    change(tensors, name)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    return caught.value.code


def test_a_lost_projection(folder):
    assert broken(folder, lambda tensors, name: tensors.pop(name)) == "missing_tensor"


def test_a_projection_of_another_rank(folder):
    def cut(tensors, name):
        tensors[name] = tensors[name][:-1].contiguous()

    assert broken(folder, cut) == "bad_shape"


def test_a_projection_that_is_not_finite(folder):
    def poison(tensors, name):
        tensors[name][0, 0] = float("nan")

    assert broken(folder, poison) == "not_finite"


def test_a_projection_without_its_gate(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["routing"] = {"default": {}, "modules": {}}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    assert caught.value.code == "unexpected_tensor"


def test_it_is_no_part_of_a_merge(adapter, folder):
    for merge in (lambda: load_factors(folder), lambda: concat_routed([adapter, adapter])):
        with pytest.raises(AdapterError) as caught:
            merge()
        assert caught.value.code == "unsupported_feature"
