"""Each system's formula as plain loops over tokens and experts, in float64, from the raw tensors.

Nothing of `routing` is used: names, shapes and scales are taken from the files again.
"""

from __future__ import annotations

import json
import math

import make_routed as make
import numpy as np
import pytest
import torch
from make_adapters import normal
from safetensors.torch import load_file

from vllm_lora_ext.adapters import check_fits, load_adapter, write_native
from vllm_lora_ext.adapters.hf import delta_reference, model_shapes

TOKENS = 9


class Files:
    """One adapted layer's tensors, by the name behind the layer's, and the folder's JSON files."""

    def __init__(self, folder, tensors, layer):
        self.tensors, self.layer = tensors, layer
        self.config = json.loads((folder / "adapter_config.json").read_text())
        side = folder / "routing.json"
        self.settings = json.loads(side.read_text()) if side.exists() else {}

    def __getitem__(self, name):
        return next(
            tensor.double()
            for full, tensor in self.tensors.items()
            if full.endswith(f"{self.layer.removeprefix('model.')}.{name}")
        )

    def has(self, name):
        wanted = f"{self.layer.removeprefix('model.')}.{name}"
        return any(full.endswith(wanted) for full in self.tensors)

    def scale(self, rank="r"):
        c = self.config
        return c["lora_alpha"] / (math.sqrt(c[rank]) if c.get("use_rslora") else c[rank])


def softmax(values):
    """Of a list of floats."""
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def largest(values, k):
    """Indices of the k largest."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def mix(weights, experts, x):
    """sum_e w_e B_e A_e x over a dict of weights and a list of (A, B)."""
    total = torch.zeros(experts[0][1].shape[0], dtype=torch.float64)
    for e, weight in weights.items():
        a, b = experts[e]
        total += weight * (b @ (a @ x))
    return total


def renormalised(p, chosen):
    total = sum(p[e] for e in chosen)
    return {e: p[e] / total for e in chosen}


def smora(f, x):
    c = f.config
    scores = [1 / (1 + math.exp(-float(v))) for v in f["lora_router.weight"] @ x]
    bias = f["lora_biases"]
    q = [scores[i // c["rank_partition"]] + float(bias[i]) for i in range(c["r"])]
    chosen = largest(q, c["activate_r"])
    total = sum(q[i] for i in chosen)
    y = torch.zeros(f["lora_B.weight"].shape[0], dtype=torch.float64)
    for i in chosen:
        gate = q[i] / total * c["activate_r"]
        y += gate * float(f["lora_A.weight"][i] @ x) * f["lora_B.weight"][:, i]
    return y * c["lora_alpha"] / c["activate_r"]


def flylora(f, x):
    c, a, b = f.config, f["lora_A.weight"], f["lora_B.weight"]
    rank, last = a.shape[0], f.layer.rsplit(".", 1)[1]
    assert rank == c["rank_pattern"].get(last, c["r"])
    alpha = c["alpha_pattern"].get(last, c["lora_alpha"])
    z = [float(v) for v in a @ x]
    key = [v + float(d) for v, d in zip(z, f["lora_topk_bias"], strict=True)]
    if f.settings["select"] == "abs":
        key = [abs(v) for v in key]
    y = torch.zeros(b.shape[0], dtype=torch.float64)
    for i in largest(key, c["top_k"]):
        y += z[i] * b[:, i]
    return y * alpha / (math.sqrt(rank) if c["use_rslora"] else rank)


def moram(f, x):
    c, s = f.config, f.settings
    rows = [(f["lora_A.weight"], f["lora_B.weight"], 1.0)]
    if f.has("loranew_A.weight"):
        rows.append((f["loranew_A.weight"], f["loranew_B.weight"], f.scale()))
    z = [float(v) for a, _, _ in rows for v in a @ x]
    columns = [(b[:, i], scale) for _, b, scale in rows for i in range(b.shape[1])]
    norm = math.sqrt(sum(v * v for v in z))
    n = [v / norm for v in z]
    k = c["moram_topk"] if c["moram_topk"] is not None else s["top_k"]
    chosen = largest(n, min(max(k, 2), len(n)))
    y = torch.zeros(len(columns[0][0]), dtype=torch.float64)
    for i, w in zip(chosen, softmax([n[i] / s["tau"] for i in chosen]), strict=True):
        if s["delta"] <= 0 or n[i] >= s["delta"]:
            y += w * z[i] * columns[i][1] * columns[i][0]
    return y


def mola(f, x):
    layer, s = int(f.layer.split(".")[2]), f.settings
    k = s["top_k"] if isinstance(s["top_k"], int) else s["top_k"][layer]
    p = softmax([float(v) for v in f["router.router.weight"] @ x])
    names = [(f"lora_A_{e}.weight", f"lora_B_{e}.weight") for e in range(len(p))]
    experts = [(f[a], f[b]) for a, b in names]
    assert len(p) == s["number_experts"][layer]
    y = mix(renormalised(p, largest(p, k)), experts, x)
    return y * f.config["lora_alpha"] / f.config["r"][layer]


def loramoe(f, x):
    p = softmax([float(v) for v in f["lora_route.weight"] @ x])
    experts = [(f[f"lora_A{e}.weight"], f[f"lora_B{e}.weight"]) for e in range(len(p))]
    return mix(dict(enumerate(p)), experts, x) * f.scale()


def hydralora(f, x):
    p = softmax([float(v) for v in f["lora_route.weight"] @ x])
    experts = [(f["lora_A.weight"], f[f"lora_B{e}.weight"]) for e in range(len(p))]
    return mix(dict(enumerate(p)), experts, x) * f.scale()


def moe_peft(f, x):
    if not f.has("moe_gate.weight"):
        return f["lora_B.weight"] @ (f["lora_A.weight"] @ x) * f.scale()
    p = softmax([float(v) for v in f["moe_gate.weight"] @ x])
    stems = [f"experts.{e}.lora_" for e in range(f.config["num_experts"])]
    experts = [(f[f"{stem}A.weight"], f[f"{stem}B.weight"]) for stem in stems]
    k = f.config.get("top_k", len(p))
    return mix(renormalised(p, largest(p, k)), experts, x) * f.scale()


def adamole(f, x):
    c = f.config
    p = softmax([float(v) for v in f["lora_gating.weight"] @ x])
    names = [(f"lora_A.{e}.weight", f"lora_B.{e}.weight") for e in range(c["num_experts"])]
    experts = [(f[a], f[b]) for a, b in names]
    if c["peft_type"] == "ADAMOLE":
        highest = 1 / len(p) if c["max_threshold"] is None else c["max_threshold"]
        logit = float(f["lora_threshold.weight"][0] @ x) + float(f["lora_threshold.bias"])
        t = highest / (1 + math.exp(-logit))
        above = {e: v - t for e, v in enumerate(p) if v >= t}
        total = sum(above.values())
        weights = {e: v / total for e, v in above.items()} if total else {}
    elif c["top_k"] is not None:
        weights = renormalised(p, largest(p, c["top_k"]))
    else:
        weights = renormalised(p, [e for e, v in enumerate(p) if v >= c["threshold"]])
    return mix(weights, experts, x) * f.scale("lora_rank")


CASES = {
    "smora": (make.write_smora, smora, {}),
    "smora one rank": (make.write_smora, smora, {"r": 7, "k": 1, "alpha": 3}),
    "smora all ranks": (make.write_smora, smora, {"r": 9, "k": 9}),
    "smora groups of 3": (make.write_smora, smora, {"r": 15, "k": 6, "partition": 3}),
    "smora cut groups": (make.write_smora, smora, {"r": 20, "k": 7, "partition": 5}),
    "smora one group": (make.write_smora, smora, {"r": 6, "k": 4, "partition": 6}),
    "smora ignores rsLoRA": (make.write_smora, smora, {"use_rslora": True}),
    "flylora": (make.write_flylora, flylora, {}),
    "flylora abs": (make.write_flylora, flylora, {"select": "abs", "r": 13, "k": 5}),
    "flylora rsLoRA": (make.write_flylora, flylora, {"use_rslora": True, "r": 7, "k": 7}),
    "flylora patterns": (
        make.write_flylora, flylora,
        {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"q_proj": 3.5}, "k": 1,
         "use_rslora": True},
    ),
    "moram": (make.write_moram, moram, {}),
    "moram k below 2": (make.write_moram, moram, {"k": 1, "bank": 7, "r": 3, "delta": 0.5}),
    "moram k above all": (make.write_moram, moram, {"k": 40, "delta": 0}),
    "moram bank only": (make.write_moram, moram, {"fresh": False, "bank": 11}),
    "moram first task": (make.write_moram, moram, {"bank": 0, "r": 6, "k": 3}),
    "moram stored k": (make.write_moram, moram, {"moram_topk": 6, "tau": 0.03}),
    "mola": (make.write_mola, mola, {}),
    "mola one k": (make.write_mola, mola, {"k": 2, "experts": (7, 2, 3), "r": (3, 5, 3)}),
    "loramoe": (make.write_loramoe, loramoe, {}),
    "loramoe one expert": (make.write_loramoe, loramoe, {"experts": 1}),
    "hydralora": (make.write_hydralora, hydralora, {}),
    "hydralora 7 of 1": (make.write_hydralora, hydralora, {"experts": 7, "r": 1, "alpha": 3}),
    "hydralora one": (make.write_hydralora, hydralora, {"experts": 1, "r": 5}),
    "adamole": (make.write_adamole, adamole, {}),
    "adamole wide": (make.write_adamole, adamole, {"max_threshold": 0.6, "experts": 3, "r": 5}),
    "adamole zero": (make.write_adamole, adamole, {"max_threshold": 0, "copies": False}),
    "adamole one": (make.write_adamole, adamole, {"experts": 1}),
    "mole": (make.write_mole, adamole, {"k": 3, "experts": 7, "r": 1}),
    "mole all": (make.write_mole, adamole, {"k": 5}),
    "mole threshold": (make.write_mole, adamole, {"k": None, "threshold": 0.3}),
    "mola of MoE-PEFT": (make.write_mola_moepeft, moe_peft, {}),
    "mola of MoE-PEFT, rsLoRA": (
        make.write_mola_moepeft, moe_peft, {"use_rslora": True, "experts": 3, "k": 1, "r": 5},
    ),
    "loramoe of MoE-PEFT": (make.write_loramoe_moepeft, moe_peft, {}),
    "loramoe of MoE-PEFT, rsLoRA": (
        make.write_loramoe_moepeft, moe_peft, {"use_rslora": True, "experts": 7, "r": 2},
    ),
}  # fmt: skip


def worst(folder, adapter, formula):
    """Largest difference over all layers, in units of the layer's largest output."""
    tensors, rng, found = (
        load_file(folder / "adapter_model.safetensors"),
        np.random.default_rng(1),
        [],
    )
    for name, module in adapter.modules.items():
        files, x_TK = Files(folder, tensors, name), normal(rng, TOKENS, module.a_RK.shape[1])
        want_TN = torch.stack([formula(files, x.double()) for x in x_TK])
        difference = (delta_reference(module, x_TK).double() - want_TN).abs().max()
        found.append(float(difference / max(1e-3, float(want_TN.abs().max()))))
    return max(found)


@pytest.mark.parametrize("base", ["base_llama", "base_qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_formula(case, base, bases, tmp_path):
    write, formula, shape = CASES[case]
    folder = write(tmp_path / "adapter", 7, base, **shape)
    adapter = load_adapter(folder)
    shapes = model_shapes(bases[base])
    check_fits(adapter, shapes, base_name=base)
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert set(adapter.modules) == set(make.linears(base, targets))
    error = worst(folder, adapter, formula)
    print(f"{case}, {base}: largest relative error {error:.1e}")
    assert error < 2e-5
    copy = load_adapter(write_native(adapter, tmp_path / "native"))
    assert worst(folder, copy, formula) == error


@pytest.mark.parametrize("system", make.WRITERS)
def test_the_reader_has_the_writers_name(system, tmp_path):
    assert load_adapter(make.WRITERS[system](tmp_path / "a", 3)).system == system


def test_a_threshold_that_nobody_reaches_leaves_the_base_model(tmp_path):
    adapter = load_adapter(make.write_mole(tmp_path / "a", 3, k=None, threshold=1.5))
    for module in adapter.modules.values():
        x_TK = normal(np.random.default_rng(0), 4, module.a_RK.shape[1])
        assert not delta_reference(module, x_TK).any()
