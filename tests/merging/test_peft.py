"""PEFT as the judge: its merges, and its loading of what we save."""

from __future__ import annotations

import copy
import json
import os

import peft
import pytest
import torch
from make_adapters import FIXTURES
from merging.random_factors import SHAPES, deltas, random_factors, relative
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, load_soups, merge, save_peft

INPUTS = FIXTURES / "merged/inputs"
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=11,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_adapter(base, folder, seed, **config):
    """A random adapter saved by PEFT itself."""
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=TARGETS, **config)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    configs = {
        "three": {"r": 3, "lora_alpha": 7}, "five": {"r": 5, "lora_alpha": 4},
        "five2": {"r": 5, "lora_alpha": 10}, "rs": {"r": 5, "lora_alpha": 3, "use_rslora": True},
        "pattern": {"r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 5},
                    "alpha_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 9}},
    }  # fmt: skip
    return {
        name: make_adapter(base, root / name, seed, **config)
        for seed, (name, config) in enumerate(configs.items())
    }


def dense_of(model, adapter):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", {})
    }


def peft_merge(base, folders, weights, **options):
    names = [f"a{i}" for i in range(len(folders))]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", **options)
    return dense_of(model, "merged")


WEIGHTS = [[0.7, -0.4], [-1.3, 0.2], [1.0, 1.0]]
ANY_RANK = [
    ("cat", {}, "cat", {}),
    ("svd", {}, "svd", {}),
    ("svd", {"svd_rank": 4}, "svd", {"svd_rank": 4}),
    ("ties_svd", {"density": 0.4}, "ties", {"space": "full", "density": 0.4}),
    ("ties_svd", {"density": 0.3, "majority_sign_method": "frequency", "svd_rank": 7},
     "ties", {"space": "full", "density": 0.3, "majority_sign_method": "frequency",
              "svd_rank": 7}),
    ("magnitude_prune_svd", {"density": 0.6},
     "magnitude_prune", {"space": "full", "density": 0.6}),
]  # fmt: skip
ONE_RANK = [
    ("linear", {}, "linear", {}),
    ("ties", {"density": 0.5}, "ties", {"density": 0.5}),
    ("ties", {"density": 0.7, "majority_sign_method": "frequency"},
     "ties", {"density": 0.7, "sign": "frequency"}),
    ("magnitude_prune", {"density": 0.35}, "magnitude_prune", {"density": 0.35}),
]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", ANY_RANK, ids=lambda case: f"{case[0]}{case[1]}")
@pytest.mark.parametrize("pair", [("three", "five"), ("five", "pattern")])
def test_merges_of_any_ranks(base, adapters, pair, case, weights):
    kind, options, method, parameters = case
    check(base, [adapters[name] for name in pair], weights, kind, options, method, parameters)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: f"{case[0]}{case[1]}")
@pytest.mark.parametrize("pair", [("five", "five2"), ("rs", "five2"), ("five2", "rs")])
def test_merges_of_one_rank(base, adapters, pair, case, weights):
    kind, options, method, parameters = case
    check(base, [adapters[name] for name in pair], weights, kind, options, method, parameters)


@pytest.mark.parametrize("kind", ["ties", "svd", "cat", "magnitude_prune_svd"])
def test_one_adapter_is_linear_whatever_is_asked(base, adapters, kind):
    options = {"density": 0.3} if kind not in ("cat", "svd") else {}
    method, _, full = kind.partition("_svd")
    parameters = {**options, **({"space": "full"} if full or kind.endswith("_svd") else {})}
    check(base, [adapters["five"]], [-0.6], kind, options, method, parameters)


def check(base, folders, weights, kind, options, method, parameters):
    wanted = peft_merge(base, folders, weights, combination_type=kind, **options)
    terms = [Term(load_factors(f), w) for f, w in zip(folders, weights, strict=True)]
    merged = merge(method, terms, {**parameters, "compat": "peft"})
    assert relative(deltas(merged.factors), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_ties_svd"])
def test_dare_with_the_masks_that_peft_drew(base, adapters, kind, monkeypatch):
    drawn, bernoulli = [], torch.bernoulli

    def record(*args, **kwargs):
        drawn.append(bernoulli(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "bernoulli", record)
    folders = [adapters["five"], adapters["five2"]]
    wanted = peft_merge(base, folders, [0.7, -0.4], combination_type=kind, density=0.6)
    full = kind.endswith("_svd")
    parts = ("delta",) if full else ("lora_A", "lora_B")
    keys = [f"{m}.{part}.a{i}" for m in wanted for part in parts for i in range(2)]
    masks = dict(zip(keys, drawn, strict=True))
    terms = [
        Term(load_factors(f), w, f"a{i}")
        for i, (f, w) in enumerate(zip(folders, [0.7, -0.4], strict=True))
    ]
    parameters = {"compat": "peft", "density": 0.6, "space": "full" if full else "factor"}
    merged = merge(kind.removesuffix("_svd"), terms, parameters, masks=masks)
    assert relative(deltas(merged.factors), wanted) < 1e-4


def test_half_precision_ties_are_those_of_the_file(base, adapters, tmp_path):
    """Many bf16 entries are equal; which of them stay must not hang on the folded scale."""
    folder = tmp_path / "half"
    folder.mkdir()
    source = adapters["five"]
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(
        {name: (t * 4).round().div(4).bfloat16() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    folders, weights = [folder, adapters["five2"]], [0.7, 0.5]
    options = {"density": 0.5}
    check(base, folders, weights, "ties", options, "ties", options)


def test_peft_and_the_reader_load_what_is_saved(base, adapters, tmp_path):
    terms = [Term(load_factors(adapters[name]), 0.5) for name in ("pattern", "rs", "three")]
    merged = merge("cat", terms)
    folder = save_peft(merged.factors, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="x")
    assert relative(dense_of(model, "x"), deltas(merged.factors)) < 1e-6
    assert relative(deltas(load_factors(folder)), deltas(merged.factors)) < 1e-6
    assert len(set(load_factors(folder).ranks().values())) > 1  # patterns were needed


@pytest.mark.parametrize("name", ["math", "code", "style", "rp"])
def test_folding_gives_peft_s_scale(name):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=11,
    )  # fmt: skip
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM(config), INPUTS / name, "x")
    factors = load_factors(INPUTS / name)
    assert relative(deltas(factors), dense_of(model, "x")) < 1e-6
    for module, scale in factors.scales.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert scale == pytest.approx(layer.scaling["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_files(dtype, tmp_path):
    factors = random_factors(1, rank=3)
    factors.modules["model.layers.1.self_attn.q_proj"] = random_factors(2, rank=1).modules[
        "model.layers.1.self_attn.q_proj"
    ]
    folders = [save_peft(factors, tmp_path / name, dtype) for name in "ab"]
    names = {path.name for path in folders[0].iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    stored = load_file(folders[0] / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    for module, pair in load_factors(folders[0]).modules.items():
        wanted = factors.modules[module]
        assert torch.equal(pair.a_RK, wanted.a_RK.to(dtype).float())
        assert torch.equal(pair.b_NR, wanted.b_NR.to(dtype).float())
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["target_modules"] == sorted(SHAPES)


def test_like_named_modules_keep_their_ranks(tmp_path):
    """A pattern key is matched as a tail of names: the longer name must win."""

    def pair(rank):
        return Pair(torch.ones(rank, 4), torch.ones(5, rank))

    modules = {"layers.0.q": pair(2), "text.layers.0.q": pair(3), "layers.10.q": pair(4)}
    folder = save_peft(Factors(modules), tmp_path / "out")
    assert load_factors(folder).ranks() == {n: p.rank for n, p in modules.items()}
    assert set(load_factors(folder).scales.values()) == {1.0}


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    factors, out = random_factors(1), tmp_path / "deep" / "out"

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("vllm_lora_ext.adapters.output.save_file", fail)
    with pytest.raises(AdapterError, match="disk full") as error:
        save_peft(factors, out)
    assert error.value.code == "output_failed"
    assert os.listdir(out.parent) == []
    monkeypatch.undo()
    out.mkdir()
    save_peft(factors, out)
    with pytest.raises(AdapterError) as error:
        save_peft(factors, out)
    assert error.value.code == "output_exists"
    assert os.listdir(out.parent) == ["out"]


def test_what_cannot_be_saved(tmp_path):
    cases = [
        (Factors({"m": Pair(torch.zeros(0, 3), torch.zeros(2, 0))}), {}, "empty_adapter"),
        (Factors({"m": Pair(torch.ones(2, 3), torch.ones(2, 1))}), {}, "rank_mismatch"),
        (Factors({"m": Pair(torch.full((1, 3), 1e9), torch.ones(2, 1))}),
         {"dtype": torch.float16}, "not_finite"),
        (random_factors(1), {"dtype": torch.float64}, "bad_value"),
    ]  # fmt: skip
    for factors, options, code in cases:
        with pytest.raises(AdapterError) as error:
            save_peft(factors, tmp_path / "out", **options)
        assert error.value.code == code
    assert not (tmp_path / "out").exists()


def test_routed_adapters_and_embeddings_are_refused(base, tmp_path):
    with pytest.raises(AdapterError) as error:
        load_factors(FIXTURES / "routed/loramoe-a/adapter")
    assert error.value.code == "unsupported_feature" and "loramoe" in error.value.text
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    )
    model.save_pretrained(tmp_path / "embedding")
    with pytest.raises(AdapterError) as error:
        load_factors(tmp_path / "embedding")
    assert error.value.code == "unsupported_feature" and "embed_tokens" in error.value.text


def test_soups_folders_need_their_scalars():
    folders = [FIXTURES / "merged/soups_cat/input" / f"adapter_{i}" for i in range(2)]
    first, second = load_soups(folders)
    assert isinstance(first.weight, dict) and set(first.weight) == set(first.factors.modules)
    for module, weight in first.weight.items():
        assert weight + second.weight[module] == pytest.approx(1.0)
    with pytest.raises(AdapterError) as error:
        load_soups([INPUTS / "eq1"])
    assert error.value.code == "missing_tensor"
