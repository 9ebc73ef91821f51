"""Adapters that a request completes: the authors' gates and logits, from what is derived."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file, save_file

from tests.adapters.conftest import load_base
from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.folder import WEIGHTS
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.conditions.column import Prompt, start_of, values
from vllm_lora_ext.convert import convert, differing
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors
from vllm_lora_ext.merging.routed import concat_routed
from vllm_lora_ext.routing import gate_reference, logits_reference

ROOT = FIXTURES / "conditioned"
HEAD = 32  # rows per attention head of the fixtures' bases
# The others are several ordinary adapters in one request, or answer with numbers.
ELSEWHERE = {"scales-a", "spans-a", "dmoerm-a", "menta-a"}
NAMES = sorted({path.name for path in ROOT.iterdir()} - ELSEWHERE)
USERS = ["reclora-a", "reclora_token-a", "reclora_lora-a", "reclora_ft-a"]
LOGITS, GATES = 1e-4, 1e-5


@pytest.fixture(scope="module")
def mha():
    return load_base("base_llama_mha")


@pytest.fixture(scope="module")
def models(bases, mha):
    return {**bases, "base_llama_mha": mha}


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


def differences(name, model, through=lambda adapter: adapter):
    """Every recorded logit of a fixture against ours: (what, got - wanted) pairs.

    Args:
        through: what is served in place of an adapter.
    """
    meta, expected = fixture(name)
    if name == "alora_chain-a":
        yield from _chain(meta, expected, model, through)
        return
    adapter = load_adapter(ROOT / name / "adapter", head_size=HEAD)
    prompts = meta.get("requests") or [{"prompt": i} for i in range(len(meta["prompt_lens"]))]
    for request in prompts:
        i = request["prompt"]
        key = request.get("key", i)
        served, rows_TC = adapter, None
        if "user" in request:
            served = adapter.template.derive(expected[f"user_vec_{request['user']}"], None)
        elif adapter.template is not None:
            served = adapter.template.derive(None, expected[f"gate_{i}"])
        elif adapter.columns:
            ids_T = expected[f"prompt_{i}"]
            spans = tuple(map(tuple, request.get("visual_spans", ())))
            prompt = Prompt(len(ids_T), ids_T.tolist(), {"image": spans} if spans else {})
            rows_TC = torch.from_numpy(values(adapter.columns, prompt, 0, len(ids_T)))
        embeds = expected.get(f"embeds_{i}")
        got = run(model, through(served), expected[f"prompt_{i}"], rows_TC, embeds)
        yield str(key), got - expected[f"logits_{key}"]


def _chain(meta, expected, model, through):
    for chain in meta["chains"]:
        for step in chain["steps"]:
            if step["adapter"] is None:
                continue
            key, name = f"c{chain['chain']}_s{step['step']}", step["adapter"]
            adapter = load_adapter(ROOT / "alora_chain-a" / "adapters" / name)
            ids_T, length = expected[f"input_{key}"], step["input_len"]
            assert start_of(adapter.columns[0].invocation, ids_T.tolist()) == step["start"]
            prompt = Prompt(length, ids_T.tolist(), {})
            ids_T = torch.cat([ids_T, expected[f"greedy_{key}"]])
            rows_TC = torch.from_numpy(values(adapter.columns, prompt, 0, len(ids_T)))
            got = run(model, through(adapter), ids_T, rows_TC)
            yield f"{key}, prompt", got[step["start"] : length] - expected[f"logits_tail_{key}"]
            yield f"{key}, answer", got[length - 1 : -1] - expected[f"greedy_logits_{key}"]


@pytest.mark.parametrize("name", NAMES)
def test_reproduces_the_recorded_logits(name, models):
    for key, difference in differences(name, models[fixture(name)[0]["base"]]):
        error = difference.abs().max().item()
        print(f"{name} {key}: largest |dlogit| {error:.1e}")
        assert error < LOGITS


@pytest.mark.parametrize("name", ["mmlora-a", "alora-a", "alora_chain-a"])
def test_native_copies_act_at_the_same_tokens(name, models, tmp_path):
    def copy(adapter):
        native = load_adapter(write_native(adapter, tmp_path / "native"))
        assert (native.columns, native.system) == (adapter.columns, adapter.system)
        return native

    for _, difference in differences(name, models[fixture(name)[0]["base"]], copy):
        assert difference.abs().max() < LOGITS


def test_wavllm_gates(mha):
    meta, expected = fixture("wavllm-a")
    template = adapter_of("wavllm-a").template
    hidden = []
    hook = mha.model.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    for request in meta["requests"]:
        i = request["prompt"]
        hidden.clear()
        mha(expected[f"gate_ids_{i}"][None])
        for size in (3, 5, len(hidden[0])):  # in chunks, as an engine has them
            pooling = template.pooling()
            for part in hidden[0].split(size):
                pooling.add(part)
            off = (pooling.gate() - expected[f"gate_{i}"]).abs().max()
            assert off < 3 * GATES  # g goes up to 3
    hook.remove()


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
                lambda _, args, name=name, seen=seen: seen.update({name: args[0][0]})
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


def _full_name(short):
    kinds = {"q": "self_attn.q_proj", "v": "self_attn.v_proj"}
    kind, layer = short.split(".")
    return f"model.layers.{layer}.{kinds[kind]}"


TEMPLATES = [*USERS, "wavllm-a"]


def pickled(folder, name):
    """The folder as the authors' program writes it, and the arguments for `convert`."""
    good = ROOT / name / "adapter"
    folder.mkdir()
    tensors = load_file(next(good.glob("*.safetensors")))
    if name == "wavllm-a":
        torch.save({"cfg": {"task": {"lora_r": 8}}, "model": tensors}, folder / "final.pt")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return json.loads((good / "routing.json").read_text())


@pytest.mark.parametrize("name", TEMPLATES)
def test_convert_reads_the_authors_pickle(name, tmp_path):
    settings = pickled(tmp_path / "theirs", name)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "theirs", settings=settings)
    assert caught.value.code == "pickle_refused"
    done = convert(tmp_path / "theirs", tmp_path / "ours", settings, allow_pickle=True)
    want = adapter_of(name)
    assert (done.system, done.layers, done.rank) == (
        want.system,
        len(want.template.sizes),
        want.rank,
    )
    got = load_adapter(tmp_path / "ours", head_size=HEAD)
    assert set(derived(got).modules) == set(derived(want).modules)
    assert not differing(derived(got), derived(want))


@pytest.mark.parametrize("name", TEMPLATES)
def test_convert_keeps_no_tensor_of_the_base(name, tmp_path):
    good, folder = ROOT / name / "adapter", tmp_path / "whole"
    shutil.copytree(good, folder)
    file = next(folder.glob("*.safetensors"))
    if name == "wavllm-a":
        llama = "gpt_model.model_llama."
        base = (f"{llama}norm.weight", f"{llama}layers.0.attention.wq.weight", "audio_proj.bias")
        save_file(load_file(file) | {n: torch.zeros(3) for n in base}, file)
    convert(folder, tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / WEIGHTS[0]).keys()
        == load_file(next(good.glob("*.safetensors"))).keys()
    )
    convert(folder, tmp_path / "ours")  # an earlier conversion is replaced


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_not_taken_for_ready_adapters(name, tmp_path):
    good = ROOT / name / "adapter"
    for refused in (
        lambda: load_factors(good),
        lambda: write_native(load_adapter(good), tmp_path / "native"),
        lambda: concat_routed([load_adapter(good)] * 2),
        lambda: convert(good, tmp_path / "half", dtype="bfloat16"),
    ):
        with pytest.raises(AdapterError) as caught:
            refused()
        assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize("name", ["alora-a", "mmlora-a"])
def test_an_adapter_of_some_tokens_is_not_merged(name):
    with pytest.raises(AdapterError) as caught:
        load_factors(ROOT / name / "adapter")
    assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize("name", [*TEMPLATES, "alora-a", "mmlora-a"])
def test_transformers_gets_no_adapter_that_lacks_what_a_request_says(name, models):
    with pytest.raises(AdapterError) as caught:
        apply_adapter(models[fixture(name)[0]["base"]], adapter_of(name))
    assert caught.value.code == "unsupported_feature"


def derived(adapter):
    template, generator = adapter.template, torch.Generator().manual_seed(1)
    if template.instruction:
        pooling = template.pooling()
        pooling.add(torch.randn(9, 64, generator=generator))
        return template.derive(None, pooling.gate())
    return template.derive(torch.randn(template.user, generator=generator), None)
