"""Adapters that a request completes: the authors' gates and logits, from what is derived."""

from __future__ import annotations

import json

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file

from tests.adapters.conftest import load_base

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.routing import gate_reference, logits_reference

ROOT = FIXTURES / "conditioned"
HEAD = 32  # rows per attention head of the fixtures' bases
USERS = ["reclora-a", "reclora_token-a", "reclora_lora-a", "reclora_ft-a"]
LOGITS, GATES = 1e-4, 1e-5


@pytest.fixture(scope="module")
def mha():
    return load_base("base_llama_mha")


def fixture(name):
    meta = json.loads((ROOT / name / "meta.json").read_text())
    return meta, load_file(ROOT / name / "expected.safetensors")


def adapter_of(name):
    return load_adapter(ROOT / name / "adapter", head_size=HEAD)


def run(model, adapter, ids_T, rows_TC=None, embeds_TK=None):
    with apply_adapter(model, adapter, rows_TC):
        if embeds_TK is not None:
            return model(inputs_embeds=embeds_TK[None]).logits[0]
        return model(ids_T[None]).logits[0]


def check(got_TV, want_TV, name):
    error = (got_TV - want_TV).abs().max().item()
    print(f"{name}: largest |dlogit| {error:.1e}")
    assert error < LOGITS, name


def test_wavllm_gates_and_logits(mha):
    meta, expected = fixture("wavllm-a")
    template = adapter_of("wavllm-a").template
    hidden = []
    hook = mha.model.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    for request in meta["requests"]:
        i = request["prompt"]
        hidden.clear()
        mha(expected[f"gate_ids_{i}"][None])
        pooling = template.pooling()
        for part in hidden[0].split(4):  # in chunks, as an engine has them
            pooling.add(part)
        gate_D = pooling.gate()
        assert (gate_D - expected[f"gate_{i}"]).abs().max() < 3 * GATES  # g goes up to 3
        adapter = template.derive(None, gate_D)
        check(run(mha, adapter, expected[f"prompt_{i}"]), expected[f"logits_{i}"], f"prompt {i}")
    hook.remove()


@pytest.mark.parametrize("name", USERS)
def test_reclora_logits(name, mha):
    meta, expected = fixture(name)
    template = adapter_of(name).template
    for request in meta["requests"]:
        adapter = template.derive(expected[f"user_vec_{request['user']}"], None)
        got = run(mha, adapter, expected[f"prompt_{request['prompt']}"])
        check(got, expected[f"logits_{request['key']}"], request["key"])


@pytest.mark.parametrize("name", ["reclora-a", "reclora_lora-a"])
def test_reclora_gates(name):
    meta, expected = fixture(name)
    layers = adapter_of(name).template.layers
    for user in meta["users"]:
        for short, want_M in zip(meta["gate_modules"], expected[f"gates_{user}"], strict=True):
            layer = layers[_full_name(short)]
            assert (layer.weights(expected[f"user_vec_{user}"]) - want_M).abs().max() < GATES


def test_reclora_gates_of_tokens(mha):
    meta, expected = fixture("reclora_token-a")
    template = adapter_of("reclora_token-a").template
    for request in meta["requests"]:
        adapter = template.derive(expected[f"user_vec_{request['user']}"], None)
        seen = {}
        hooks = [
            mha.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0][0]})
            )
            for name in adapter.modules
        ]
        run(mha, adapter, expected[f"prompt_{request['prompt']}"])
        for hook in hooks:
            hook.remove()
        want_TMG = expected[f"gates_{request['key']}"]
        for i, short in enumerate(meta["gate_modules"]):
            module = adapter.modules[_full_name(short)]
            u_TG = logits_reference(module, seen[_full_name(short)])
            g_TR = gate_reference(module.gate, u_TG)[:, :: module.gate.blocks[0]]
            assert (g_TR - want_TMG[:, i]).abs().max() < GATES


def test_mmlora_logits(mha, tmp_path):
    meta, expected = fixture("mmlora-a")
    adapter = adapter_of("mmlora-a")
    assert [c.modalities for c in adapter.columns] == [("image",), ("text",)]
    copy = load_adapter(write_native(adapter, tmp_path / "native"))
    for request in meta["requests"]:
        i = request["prompt"]
        image_T = torch.zeros(len(expected[f"prompt_{i}"]))
        for start, stop in request["visual_spans"]:
            image_T[start:stop] = 1
        rows_TC = torch.stack([image_T, 1 - image_T], dim=1)
        embeds = expected.get(f"embeds_{i}")
        for one in (adapter, copy):
            got = run(mha, one, expected[f"prompt_{i}"], rows_TC, embeds)
            check(got, expected[f"logits_{i}"], f"prompt {i}")


def from_start(length, start):
    return (torch.arange(length) >= start).float()[:, None]


def test_alora_logits(bases, tmp_path):
    meta, expected = fixture("alora-a")
    adapter = adapter_of("alora-a")
    assert [c.invocation for c in adapter.columns] == [tuple(meta["invocation_tokens"])]
    copy = load_adapter(write_native(adapter, tmp_path / "native"))
    assert copy.columns == adapter.columns
    for i, starts in enumerate(meta["invocation_starts"]):
        ids_T = expected[f"prompt_{i}"]
        rows_TC = from_start(len(ids_T), starts[-1] if starts else len(ids_T))
        for one in (adapter, copy):
            got = run(bases[meta["base"]], one, ids_T, rows_TC)
            check(got, expected[f"logits_{i}"], f"prompt {i}")


def test_alora_chain_logits(bases):
    meta, expected = fixture("alora_chain-a")
    adapters = {
        name: load_adapter(ROOT / "alora_chain-a" / "adapters" / name)
        for name in meta["invocation_tokens"]
    }
    model = bases[meta["base"]]
    for chain in meta["chains"]:
        for step in chain["steps"]:
            if step["adapter"] is None:
                continue
            key = f"c{chain['chain']}_s{step['step']}"
            ids_T = torch.cat([expected[f"input_{key}"], expected[f"greedy_{key}"]])
            adapter, start = adapters[step["adapter"]], step["start"]
            got = run(model, adapter, ids_T, from_start(len(ids_T), start))
            tail, last = step["input_len"] - start, step["input_len"] - 1
            check(got[start:][:tail], expected[f"logits_tail_{key}"], key)
            check(got[last:-1], expected[f"greedy_logits_{key}"], key)


def _full_name(short):
    kinds = {"q": "self_attn.q_proj", "v": "self_attn.v_proj"}
    kind, layer = short.split(".")
    return f"model.layers.{layer}.{kinds[kind]}"
