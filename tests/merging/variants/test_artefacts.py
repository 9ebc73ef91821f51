"""Artefacts that PEFT does not write: NOLA, LoRAM, LLM-Pruner, LoRAFactory, ScaleZero, pickles."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import FORMATS
from vllm_lora_ext.adapters.readers.nola import expand
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.variants import CONVERTERS, extract, read_variant
from vllm_lora_ext.merging.variants.lowrank import cut, drop_zeros, norm
from vllm_lora_ext.merging.variants.pruned import query_channels

P = "base_model.model."


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora_folder(folder, tensors, r, alpha=8, **more):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": [], **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def code_of(call):
    with pytest.raises(AdapterError) as refused:
        call()
    return refused.value.code


# NOLA


def nola_tensors(out=20, width=14, r=3, k=29, seed=4):
    tensors, want = {}, {}
    for side, shape in (("A", (r, width)), ("B", (out, r))):
        number = (1 << 33) + seed + ord(side)  # no float32 holds it
        torch.manual_seed(number)
        basis = torch.zeros(k, *shape).uniform_(-1, 1)
        value, frozen = rand(k, seed=seed), rand(*shape, seed=seed + 1)
        want[side] = frozen + torch.einsum("k,kab->ab", value, basis) / math.sqrt(k)
        name = f"{P}model.layers.0.mlp.up_proj.lora_{side}"
        tensors[f"{name}.weight"] = frozen
        tensors[f"{name}.seed"] = torch.tensor([number])
        tensors[f"{name}.coefficients"] = value
        want[f"check_{side}"] = {
            "seed": number, "first_four": basis.flatten()[:4].tolist(), "last": float(basis.max()),
        }  # fmt: skip
        want[f"check_{side}"]["last"] = float(basis.flatten()[-1])
    return tensors, want


def test_nola(tmp_path):
    tensors, want = nola_tensors()
    lora_folder(tmp_path, tensors, r=3, alpha=7, use_nola=True, nola_num_basis=29)
    got = read_variant(tmp_path)
    assert got.system == "nola" and got.exact and "checked" in got.notes[0]
    pair = got.factors.modules["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(pair.delta(), 7 / 3 * want["B"] @ want["A"], atol=1e-5, rtol=1e-5)
    check = {f"model.layers.0.mlp.up_proj.lora_{s}": want[f"check_{s}"] for s in "AB"}
    assert read_variant(tmp_path, settings={"basis_check": check}).notes == ()
    check["model.layers.0.mlp.up_proj.lora_B"]["last"] += 0.01
    call = lambda: read_variant(tmp_path, settings={"basis_check": check})  # noqa: E731
    assert code_of(call) == "setting_mismatch"
    call = lambda: read_variant(tmp_path, settings={"device": "cuda"})  # noqa: E731
    assert code_of(call) == "unsupported_feature"


@pytest.mark.parametrize("chunk", [1, 50, 333, 1 << 20])
def test_nola_chunks_keep_the_stream(chunk, monkeypatch):
    value = rand(23)
    whole = expand(77, value, (5, 7))
    monkeypatch.setattr("vllm_lora_ext.adapters.readers.nola._CHUNK", chunk)
    assert torch.equal(expand(77, value, (5, 7)), whole)


# LoRAM and LLM-Pruner


def pruned_model(seed=0, hidden_too=False):
    """A whole checkpoint, the pruned one, its adapter, and the kept channels."""
    hidden, inner, heads, kv, size = 12, 20, 6, 3, 4
    kept_mlp = torch.tensor([0, 3, 4, 7, 11, 12, 18])
    kept_kv = torch.arange(kv * size).view(kv, size)[[0, 2]].flatten()
    kept_q = torch.arange(heads * size).view(kv, -1)[[0, 2]].flatten()
    kept_hidden = torch.tensor([0, 1, 4, 5, 8, 10]) if hidden_too else torch.arange(hidden)
    places = {
        "mlp.gate_proj": (inner, kept_mlp, hidden, kept_hidden),
        "mlp.up_proj": (inner, kept_mlp, hidden, kept_hidden),
        "mlp.down_proj": (hidden, kept_hidden, inner, kept_mlp),
        "self_attn.q_proj": (heads * size, kept_q, hidden, kept_hidden),
        "self_attn.k_proj": (kv * size, kept_kv, hidden, kept_hidden),
        "self_attn.v_proj": (kv * size, kept_kv, hidden, kept_hidden),
        "self_attn.o_proj": (hidden, kept_hidden, heads * size, kept_q),
    }
    whole = {"model.embed_tokens.weight": rand(30, hidden, seed=seed)}
    small = {"model.embed_tokens.weight": whole["model.embed_tokens.weight"][:, kept_hidden]}
    adapter, want = {}, {}
    for i, (name, (out, rows, width, columns)) in enumerate(places.items()):
        module = f"model.layers.0.{name}"
        whole[f"{module}.weight"] = rand(out, width, seed=seed + i + 1)
        small[f"{module}.weight"] = whole[f"{module}.weight"][rows][:, columns]
        a, b = rand(3, len(columns), seed=50 + i), rand(len(rows), 3, seed=70 + i)
        adapter[f"{P}{module}.lora_A.weight"], adapter[f"{P}{module}.lora_B.weight"] = a, b
        want[module] = torch.zeros(out, width)
        want[module][rows[:, None], columns] = 8 / 3 * b @ a
    index = {
        "model.layers.0.mlp.pruned_idx": torch.tensor(
            [i for i in range(inner) if i not in kept_mlp]
        ),
        "model.layers.0.self_attn.pruned_idx": torch.arange(kv * size)
        .view(kv, size)[[1]]
        .flatten(),
    }
    return whole, small, adapter, want, index


GEOMETRY = {"head_dim": 4, "num_heads": 6, "num_key_value_heads": 3}


def check_deltas(got, want):
    assert got.exact and set(got.factors.modules) == set(want)
    for module, delta in want.items():
        torch.testing.assert_close(got.factors.modules[module].delta(), delta)


def test_loram(tmp_path):
    _, _, adapter, want, index = pruned_model()
    folder = lora_folder(tmp_path / "a", adapter, r=3)
    (tmp_path / "index").mkdir()
    save_file(index, tmp_path / "index" / "pruned_idx.safetensors")
    got = read_variant(folder, index=tmp_path / "index", settings=GEOMETRY)
    check_deltas(got, want)
    assert got.system == "loram"
    call = lambda: read_variant(folder, index=tmp_path / "index")  # noqa: E731
    assert code_of(call) == "missing_setting"
    noisy = {**GEOMETRY, "lora_recover_type": "normA"}
    call = lambda: read_variant(folder, index=tmp_path / "index", settings=noisy)  # noqa: E731
    assert code_of(call) == "unsupported_feature"
    torn = dict(index)
    torn["model.layers.0.self_attn.pruned_idx"] = torch.tensor([4, 5, 6])
    save_file(torn, tmp_path / "index" / "pruned_idx.safetensors")
    call = lambda: read_variant(folder, index=tmp_path / "index", settings=GEOMETRY)  # noqa: E731
    assert code_of(call) == "bad_value"


def test_loram_with_the_authors_torch_files(tmp_path):
    _, _, adapter, want, index = pruned_model()
    folder = lora_folder(tmp_path / "a", adapter, r=3)
    (tmp_path / "index").mkdir()
    files = {"mlp": "mlp.gate_proj", "self_attn": "self_attn.k_proj"}
    for kind, name in files.items():
        content = {"pruned_idx": index[f"model.layers.0.{kind}.pruned_idx"]}
        torch.save(content, tmp_path / "index" / f"model.layers.0.{name}.pt")
    call = lambda: read_variant(folder, index=tmp_path / "index", settings=GEOMETRY)  # noqa: E731
    assert code_of(call) == "pickle_refused"
    got = read_variant(folder, index=tmp_path / "index", settings=GEOMETRY, allow_pickle=True)
    check_deltas(got, want)


def test_query_channels_of_unsorted_heads():
    gone = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3])
    assert query_channels(gone, 4, 6, 3).tolist() == [*range(8), *range(16, 24)]


@pytest.mark.parametrize("hidden_too", [False, True])
def test_llm_pruner_by_matching_rows(hidden_too, tmp_path):
    whole, small, adapter, want, _ = pruned_model(hidden_too=hidden_too)
    folder = lora_folder(tmp_path / "a", adapter, r=3)
    for name, tensors in (("whole", whole), ("small", small)):
        contiguous = {k: v.contiguous() for k, v in tensors.items()}
        save_file(contiguous, tmp_path / f"{name}.safetensors")
    paths = {"base": tmp_path / "whole.safetensors", "pruned": tmp_path / "small.safetensors"}
    got = read_variant(folder, **paths)
    check_deltas(got, want)
    assert "repair" in got.notes[0]
    tuned = {k: v + 1e-3 for k, v in small.items()}
    save_file({k: v.contiguous() for k, v in tuned.items()}, tmp_path / "small.safetensors")
    assert code_of(lambda: read_variant(folder, **paths)) == "shape_mismatch"
    del paths["base"]
    assert code_of(lambda: read_variant(folder, **paths)) == "missing_setting"


# LoRAFactory


def factory(folder, tensors, name="model.layers.1.self_attn.v_proj"):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{key}": value for key, value in tensors.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def factory_delta(folder, variant, **more):
    settings = {"lora_variant": variant, "lora_scaler": 6.0, **more.pop("settings", {})}
    got = read_variant(folder, settings=settings, **more)
    assert got.exact and got.system == "lorafactory"
    return got.factors.modules["model.layers.1.self_attn.v_proj"].delta()


def test_lorafactory_formulas(tmp_path):
    a, b, m = rand(5, 14), rand(9, 5, seed=1), rand(5, 5, seed=2)
    plain = {"weight_a": a, "weight_b": b, "weight": rand(9, 14, seed=3)}
    folder = factory(tmp_path / "plain", plain)
    close = torch.testing.assert_close
    close(factory_delta(folder, "lora"), 6 / 5 * b @ a)
    close(factory_delta(folder, "rslora"), 6 / math.sqrt(5) * b @ a)
    mixed = factory(tmp_path / "mixed", {**plain, "weight_ab_mixer": m})
    close(factory_delta(mixed, "moslora"), 6 / 5 * b @ m @ a)
    e, gate, num = rand(5, 1, seed=4), rand(5, 1, seed=5), torch.tensor([5.0])
    ada = factory(tmp_path / "ada", {**plain, "weight_e": e, "ranknum": num})
    close(factory_delta(ada, "adalora"), 6 / 5 * b @ (a * e))
    sa = factory(tmp_path / "sa", {**plain, "structure_gate": gate, "ranknum": num})
    close(factory_delta(sa, "salora"), 6 / 6 * b @ (a * gate))
    small = [rand(2, 5, seed=6), rand(2, 5, seed=7), rand(2, 5, seed=8)]
    tall = [rand(3, 2, seed=9), rand(3, 2, seed=10), rand(3, 2, seed=11)]
    parts = {f"weight_a.{i}": t for i, t in enumerate(small)}
    parts |= {f"weight_b.{i}": t for i, t in enumerate(tall)}
    blocks = [y @ x for x, y in zip(small, tall, strict=True)]
    me = factory(tmp_path / "me", parts)
    close(factory_delta(me, "melora"), 6 / 6 * torch.block_diag(*blocks))


def test_lorafactory_rebased(tmp_path):
    a, b, a0, b0 = rand(4, 14), rand(9, 4, seed=1), rand(4, 14, seed=2), rand(9, 4, seed=3)
    want = 6 / 4 * (b @ a - b0 @ a0)
    now = factory(tmp_path / "now", {"weight_a": a, "weight_b": b})
    then = factory(tmp_path / "then", {"weight_a": a0, "weight_b": b0})
    torch.testing.assert_close(factory_delta(now, "milora", init=then), want)
    kept = {"weight_a": a, "weight_b": b, "init_weight_a": a0, "init_weight_b": b0}
    torch.testing.assert_close(factory_delta(factory(tmp_path / "k", kept), "pissa"), want)
    assert code_of(lambda: factory_delta(now, "pissa")) == "missing_setting"
    assert code_of(lambda: factory_delta(now, "lora_ga")) == "missing_setting"
    no = {"lora_reset_weight": False}
    torch.testing.assert_close(factory_delta(now, "lora_ga", settings=no), 6 / 4 * b @ a)
    mixers = {"weight_a_mixer": rand(4, 1), "weight_b_mixer": rand(1, 4, seed=1)}
    nora = factory(tmp_path / "nora", {"weight_a": a, "weight_b": b, **mixers})
    nora0 = factory(tmp_path / "nora0", {"weight_a": a0, "weight_b": b0, **mixers})
    mixer = mixers["weight_a_mixer"] @ mixers["weight_b_mixer"]
    want = 6 / 4 * (b @ mixer @ a - b0 @ mixer @ a0)
    torch.testing.assert_close(factory_delta(nora, "nora", init=nora0), want)


@pytest.mark.parametrize("variant", ["sinelora", "relora", "mora", "lora_moe", "gora"])
def test_lorafactory_refuses_by_name(variant, tmp_path):
    folder = factory(tmp_path, {"weight_a": rand(4, 14), "weight_b": rand(9, 4)})
    assert code_of(lambda: factory_delta(folder, variant)) == "unsupported_feature"


def test_lorafactory_guesses_nothing(tmp_path):
    folder = factory(tmp_path, {"weight_a": rand(4, 14), "weight_b": rand(9, 4)})
    assert code_of(lambda: read_variant(folder)) == "missing_setting"
    call = lambda: read_variant(folder, settings={"lora_variant": "lora"})  # noqa: E731
    assert code_of(call) == "missing_setting"
    assert code_of(lambda: factory_delta(folder, "moslora")) == "missing_tensor"


@pytest.mark.parametrize("odd", [None, True, [], [1], {}, "x", 1e999, 10**400])
@pytest.mark.parametrize("key", ["lora_variant", "lora_scaler"])
def test_lorafactory_refuses_odd_settings(tmp_path, key, odd):
    folder = factory(tmp_path, {"weight_a": rand(4, 14), "weight_b": rand(9, 4)})
    assert code_of(lambda: factory_delta(folder, "lora", settings={key: odd})) == "bad_value"


# ScaleZero


def curriculum(alpha_0_logit):
    tensors = {
        "weight": rand(11, 13), "bias": rand(11, seed=1),
        "base_weight_scale.logit": torch.tensor(alpha_0_logit),
    }  # fmt: skip
    for j in range(3):
        tensors[f"adapters.{j}.lora_A"] = rand(2, 13, seed=10 + j)
        tensors[f"adapters.{j}.lora_B"] = rand(11, 2, seed=20 + j)
        tensors[f"adapter_scales.{j}.logit"] = torch.tensor(0.3 * j - 0.5)
    return {f"model.layers.0.mlp.up_proj.{key}": value for key, value in tensors.items()}


@pytest.mark.parametrize("stage", [1, 3])
def test_scalezero_with_a_base_gate(stage, tmp_path):
    tensors = curriculum(0.8)
    path = tmp_path / "state.safetensors"
    save_file(tensors, path)
    n = "model.layers.0.mlp.up_proj"
    gate = lambda logit: 1 + 0.2 * math.tanh(float(logit))  # noqa: E731
    weight, alpha_0 = tensors[f"{n}.weight"], gate(tensors[f"{n}.base_weight_scale.logit"])
    tuned = alpha_0 * weight
    for j in range(stage):
        scale = gate(tensors[f"{n}.adapter_scales.{j}.logit"]) * 6 / 2
        b, a = (tensors[f"{n}.adapters.{j}.lora_{s}"] for s in "BA")
        tuned = tuned + scale * b @ a
    settings = {"stage": stage, "lora_alpha": 6}
    exact = read_variant(path, settings=settings, multipliers=True)
    pair = exact.factors.modules[n]
    assert exact.exact and pair.rank == 2 * stage
    made = exact.out_scale[n][:, None] * (weight + pair.delta())
    torch.testing.assert_close(made, tuned)
    whole = read_variant(path, settings=settings, rank=11)
    torch.testing.assert_close(whole.factors.modules[n].delta(), tuned - weight)
    assert code_of(lambda: read_variant(path, settings=settings)) == "missing_setting"


def test_scalezero_without_one_is_a_lora(tmp_path):
    path = tmp_path / "state.safetensors"
    save_file(curriculum(0.0), path)
    got = read_variant(path, settings={"stage": 2, "lora_alpha": 6}, multipliers=True)
    assert got.exact and got.out_scale is None and got.factors.rank == 4


# Two checkpoints


def test_extract(tmp_path):
    base = {
        "model.layers.0.mlp.up_proj.weight": rand(15, 10),
        "model.layers.0.mlp.down_proj.weight": rand(10, 15, seed=1),
        "model.embed_tokens.weight": rand(30, 10, seed=2),
        "model.norm.weight": rand(10, seed=3),
    }
    low = rand(15, 3, seed=4) @ rand(3, 10, seed=5)
    tuned = {**base, "model.layers.0.mlp.up_proj.weight": base[next(iter(base))] + low}
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 1
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "tuned").mkdir()
    names = sorted(tuned)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in range(2):
        some = {n: tuned[n] for n in names if weight_map[n] == f"part-{part}.safetensors"}
        save_file(some, tmp_path / "tuned" / f"part-{part}.safetensors")
    index = tmp_path / "tuned" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    got = extract(tmp_path / "tuned", tmp_path / "base.safetensors", 4)
    assert got.exact and list(got.factors.modules) == ["model.layers.0.mlp.up_proj"]
    pair = got.factors.modules["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(pair.delta(), low, atol=1e-5, rtol=1e-4)
    some = extract(tmp_path / "tuned", tmp_path / "base.safetensors", 2)
    s = torch.linalg.svdvals(low.double())
    best = float(s[2:].norm() / s.norm())
    assert some.error["model.layers.0.mlp.up_proj"] == pytest.approx(best, rel=1e-4)
    bounded = extract(
        tmp_path / "tuned", tmp_path / "base.safetensors", 9, sv_epsilon=float(s[1] + s[2]) / 2
    )
    assert bounded.factors.rank == 2
    same = lambda: extract(tmp_path / "tuned", tmp_path / "tuned", 2)  # noqa: E731
    assert code_of(same) == "empty_adapter"


def test_errors_are_measured_without_the_dense_matrix():
    twice = Pair(torch.cat([rand(3, 30)] * 2), torch.cat([rand(20, 3, seed=1)] * 2, dim=1))
    small = drop_zeros(twice)
    assert small.rank == 3
    torch.testing.assert_close(small.delta(), twice.delta(), atol=1e-5, rtol=1e-5)
    assert norm(twice) == pytest.approx(float(twice.delta().norm()), rel=1e-6)
    shorter, error = cut(twice, 2)
    s = torch.linalg.svdvals(twice.delta().double())
    assert shorter.rank == 2 and error == pytest.approx(float(s[2] / s.norm()), rel=1e-5)
    assert cut(twice, 3)[1] < 1e-6


# Pickles


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


def test_pickles_only_when_allowed(tmp_path):
    tensors = {
        f"{P}model.layers.0.mlp.up_proj.hada_{n}": rand(*s, seed=i)
        for i, (n, s) in enumerate(
            {"w1_a": (9, 2), "w1_b": (2, 8), "w2_a": (9, 2), "w2_b": (2, 8)}.items()
        )
    }
    config = {"peft_type": "LOHA", "r": 2, "alpha": 3, "target_modules": ["up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert code_of(lambda: read_variant(tmp_path)) == "pickle_refused"
    got = read_variant(tmp_path, allow_pickle=True)
    assert got.system == "loha" and got.exact and got.factors.rank == 4
    w = [tensors[f"{P}model.layers.0.mlp.up_proj.hada_{n}"] for n in ("w1_a", "w1_b")]
    v = [tensors[f"{P}model.layers.0.mlp.up_proj.hada_{n}"] for n in ("w2_a", "w2_b")]
    want = 1.5 * (w[0] @ w[1]) * (v[0] @ v[1])
    delta = got.factors.modules["model.layers.0.mlp.up_proj"].delta()
    torch.testing.assert_close(delta, want, atol=1e-5, rtol=1e-5)
    assert got.factors.source == os.fspath(tmp_path)
    trace = tmp_path / "should_not_exist"
    torch.save({"x": Evil(trace)}, tmp_path / "adapter_model.bin")
    assert code_of(lambda: read_variant(tmp_path, allow_pickle=True)) == "pickle_refused"
    assert not trace.exists()


# What all have in common


def test_the_table():
    """What is not served has a converter or a reason, and every converter is of a row."""
    assert set(CONVERTERS) <= {row.name for row in FORMATS}
    for row in FORMATS:
        if row.status == "convert":
            assert row.name in CONVERTERS and row.needs
        if row.status == "refused":
            assert row.name not in CONVERTERS and not row.needs


@pytest.mark.parametrize("broken", ["extra", "nan", "missing", "key"])
def test_strict_at_the_door(broken, tmp_path):
    name = f"{P}model.layers.0.mlp.up_proj.hra_u"
    tensors = {name: rand(8, 3)}
    config = {"peft_type": "HRA", "r": 3, "apply_GS": False}
    if broken == "extra":
        tensors["surprise"] = rand(2)
    if broken == "nan":
        tensors[name][0, 0] = float("nan")
    if broken == "missing":
        del config["r"]
    if broken == "key":
        config["new_trick"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "base").mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": rand(5, 8)},
              tmp_path / "base" / "model.safetensors")  # fmt: skip
    codes = {
        "extra": "unexpected_tensor", "nan": "not_finite", "missing": "missing_key",
        "key": "unknown_key",
    }  # fmt: skip
    assert code_of(lambda: read_variant(tmp_path, base=tmp_path / "base")) == codes[broken]
    assert code_of(lambda: read_variant(tmp_path)) in (codes[broken], "missing_setting")


def test_an_ordinary_lora_passes_through(tmp_path):
    name = f"{P}model.layers.0.mlp.up_proj.lora"
    tensors = {f"{name}_A.weight": rand(4, 8), f"{name}_B.weight": rand(6, 4, seed=1)}
    got = read_variant(lora_folder(tmp_path, tensors, r=4, alpha=2))
    assert got.system == "plain" and got.exact
    want = 0.5 * tensors[f"{name}_B.weight"] @ tensors[f"{name}_A.weight"]
    torch.testing.assert_close(got.factors.modules["model.layers.0.mlp.up_proj"].delta(), want)
    assert code_of(lambda: read_variant(tmp_path, settings={"x": 1})) == "unknown_key"
    assert load_file(tmp_path / "adapter_model.safetensors")
