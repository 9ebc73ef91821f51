"""Random adapters of every format that is served, with shapes drawn at random.

    folder = write_random("lokr", tmp_path / "a", seed=3, base_name="base_qwen2")

`make_routed` and `make_multi` write the routed systems and those made of several folders; this
file adds the others, named as PEFT 0.21 and the authors' code name things, and one table of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import make_multi as multi
import make_routed as make
import numpy as np
import torch
from make_adapters import TARGETS, normal, pick, random_adapter, router_spec
from make_multi import write_plain
from make_routed import FIXTURES, PREFIX, linears
from safetensors.torch import save_file
from transformers import AutoConfig

from vllm_lora_ext.adapters import write_native
from vllm_lora_ext.routing import GateSpec

Rng = np.random.Generator
Tensors = dict[str, torch.Tensor]
Shape = dict[str, Any]
EXPERTS, RANKS, SCALES = (2, 3, 5, 7), (3, 6, 12), (4, 7, 2.5, 11)
MLP = ("gate_proj", "up_proj", "down_proj")
LEGACY = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
STRENGTH = 0.1  # root mean square of B


def _save(
    folder: str | Path, config: Shape, tensors: Tensors, settings: Shape | None = None
) -> Path:
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    (where / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        (where / "routing.json").write_text(json.dumps(settings))
    return where


def _a(rng: Rng, rank: int, width: int) -> torch.Tensor:
    return normal(rng, rank, width) / math.sqrt(width)


def _b(rng: Rng, out: int, rank: int) -> torch.Tensor:
    return normal(rng, out, rank) * STRENGTH


def write_mixlora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, experts: int = 3,
    r: int = 3, alpha: float = 5, k: int = 2, use_rslora: bool = False, act_fn: str | None = None,
    expert_lora: Shape | None = None, top_p: float | None = None, temperature: float = 0.0,
    legacy: bool = False, targets: Sequence[str] = ("q_proj", *MLP),
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """With `top_p` the dynamic strategy; `legacy` is the layout of MixLoRA's predecessor.

    Of the MLP's linears at least one must be among the targets. `expert_lora` is MoE-PEFT's: the
    experts' own r, lora_alpha and use_rslora.
    """
    rng, tensors, stem = np.random.default_rng(seed), {}, "mixlora.layers."
    own = (expert_lora or {}).get("r", r)
    for name, (width, out) in linears(base_name, targets, layers).items():
        layer, block, linear = name.split(".")[2:]
        if block == "self_attn":
            tensors[f"{stem}{layer}.{block}.{linear}.lora_A.weight"] = _a(rng, r, width)
            tensors[f"{stem}{layer}.{block}.{linear}.lora_B.weight"] = _b(rng, out, r)
            continue
        for e in range(experts):
            expert = f"{stem}{layer}.mlp.{linear}.experts.{e}."
            if legacy:
                expert = f"{stem}{layer}.experts.{e}.{LEGACY[linear]}_proj."
            tensors[f"{expert}lora_A.weight"] = _a(rng, own, width)
            tensors[f"{expert}lora_B.weight"] = _b(rng, out, own)
        gate = f"{stem}{layer}.gate.weight" if legacy else f"{stem}{layer}.mlp.moe_gate.weight"
        hidden = linears(base_name, ("gate_proj",))[f"model.layers.{layer}.mlp.gate_proj"][0]
        if gate not in tensors:
            tensors[gate] = normal(rng, experts, hidden) * (1.5 / math.sqrt(hidden))
    config: Shape = {
        "bias": "none", "peft_type": "MIXLORA", "r": r, "lora_alpha": alpha, "lora_dropout": 0.05,
        "target_modules": {t: t in targets for t in TARGETS} if seed % 2 else sorted(targets),
        "routing_strategy": "mixtral" if legacy else "mixlora", "num_experts": experts,
        "top_k": k, "base_model_name_or_path": base_name, "task_type": "CAUSAL_LM",
        "router_aux_loss_coef": 0.01, "router_loss": True,
    }  # fmt: skip
    if use_rslora:
        config["use_rslora"] = True
    if act_fn is not None:
        config["act_fn"] = act_fn
    if expert_lora is not None:
        config["expert_lora"] = expert_lora
    if top_p is not None:
        config |= {
            "routing_strategy": "mixlora-dynamic", "top_p": top_p, "temperature": temperature
        }  # fmt: skip
    return _save(folder, config, tensors)


def write_meteora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, experts: int = 3,
    r: int = 3, k: int = 2, alphas: Sequence[float] = SCALES, temperature: float = 1.0,
    scaling: bool = False, targets: Sequence[str] = ("q_proj", "up_proj", "down_proj"),
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """Every second expert is rsLoRA. The first adapted layer's base weights are saved along."""
    where, names = Path(folder), [f"task_{(2 * e + 1) % experts}" for e in range(experts)]
    names = names if len(set(names)) == experts else [f"task_{e}" for e in range(experts)]
    rng, tensors, scales = np.random.default_rng(seed), {}, []
    for e, name in enumerate(names):
        alpha, root = alphas[e % len(alphas)], e % 2 == 1
        scales.append(alpha / (math.sqrt(r) if root else r))
        write_plain(
            where / name, seed + e, base_name, r=r, alpha=alpha, use_rslora=root, targets=targets,
            layers=layers,
        )  # fmt: skip
    for name, (width, out) in linears(base_name, targets, layers).items():
        stem = f"{PREFIX}{name}."
        tensors[f"{stem}lora_A.weight"] = _a(rng, experts * r, width)
        tensors[f"{stem}lora_B.weight"] = _b(rng, out, experts * r)
        tensors[f"{stem}moe_gate.weight"] = normal(rng, experts, width) * (1.5 / math.sqrt(width))
    stem, (width, out) = next(iter(linears(base_name, targets, layers).items()))
    tensors[f"{PREFIX}{stem}.base_layer.weight"] = normal(rng, out, width)
    tensors[f"{PREFIX}model.norm.weight"] = normal(rng, width)
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    settings: Shape = {"top_k": k, "temperature": temperature, "expert_order": names}
    (where / "routing.json").write_text(
        json.dumps(settings | ({"scaling": scales} if scaling else {}))
    )
    return where


def _tuner(base_name: str, targets: Sequence[str], peft_type: str, **own: Any) -> Shape:
    """What the configs of PEFT's tuners beside LoRA have in common."""
    return {
        "auto_mapping": None, "base_model_name_or_path": base_name, "exclude_modules": None,
        "inference_mode": True, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "modules_to_save": None, "peft_type": peft_type,
        "peft_version": "0.21.2", "revision": None, "target_modules": list(targets),
        "task_type": "CAUSAL_LM", **own,
    }  # fmt: skip


def write_adalora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, init_r: int = 5,
    alpha: float = 7, targets: Sequence[str] = make.SOME, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """Layers keep 1 to init_r ranks, and of these some have E = 0."""
    rng, tensors, kept = np.random.default_rng(seed), {}, {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        r, stem = int(rng.integers(1, init_r + 1)), f"{PREFIX}{name}."
        kept[f"{name}.lora_E"] = [i < r for i in range(init_r)]
        sizes = normal(rng, r, 1) * 2
        sizes[1::3] = 0
        tensors[f"{stem}lora_A"] = _a(rng, r, width)
        tensors[f"{stem}lora_B"] = _b(rng, out, r)
        tensors[f"{stem}lora_E"] = sizes
    config = make._later_peft(
        base_name, targets, peft_type="ADALORA", peft_version="0.21.2", r=8, lora_alpha=alpha,
        init_r=init_r, target_r=init_r - 1, rank_pattern=kept, total_step=100, beta1=0.85,
        beta2=0.85, deltaT=1, orth_reg_weight=0.5, tinit=0, tfinal=0,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_loha(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 3,
    alpha: float = 5, patterns: bool = True, targets: Sequence[str] = make.SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    rng, tensors = np.random.default_rng(seed), {}
    first = targets[0] if patterns else ""
    for name, (width, out) in linears(base_name, targets, layers).items():
        rank = r + 1 if name.endswith(f".{first}") else r
        for i in (1, 2):
            tensors[f"{PREFIX}{name}.hada_w{i}_a"] = normal(rng, out, rank) * 0.3
            tensors[f"{PREFIX}{name}.hada_w{i}_b"] = _a(rng, rank, width) * width**0.25
    config = _tuner(
        base_name, targets, "LOHA", r=r, alpha=alpha, rank_pattern={first: r + 1} if first else {},
        alpha_pattern={first: 2 * alpha} if first else {}, module_dropout=0.0, rank_dropout=0.0,
        use_effective_conv2d=False,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_lokr(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 2,
    alpha: float = 3, factor: int = 4, both: bool = False, whole: bool = False,
    targets: Sequence[str] = make.SOME, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`both`: also the small matrix is a product; `whole`: neither is."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        sides = {
            "w1": (factor, factor, both and not whole),
            "w2": (out // factor, width // factor, not whole),
        }
        for side, (rows, columns, product) in sides.items():
            stem = f"{PREFIX}{name}.lokr_{side}"
            if product:
                tensors[f"{stem}_a"] = normal(rng, rows, r) * 0.3
                tensors[f"{stem}_b"] = normal(rng, r, columns) * 0.3
            else:
                tensors[stem] = normal(rng, rows, columns) * 0.2
    config = _tuner(
        base_name, targets, "LOKR", r=r, alpha=alpha, rank_pattern={}, alpha_pattern={},
        decompose_both=both, decompose_factor=factor, module_dropout=0.0, rank_dropout=0.0,
        rank_dropout_scale=False, use_effective_conv2d=False,
    )  # fmt: skip
    return _save(folder, config, tensors)


def _sizes(base_name: str, targets: Sequence[str], by_name: bool) -> Shape:
    """The setting `sizes`, by layer or by last word."""
    table = linears(base_name, targets)
    return {"sizes": {n if by_name else n.rsplit(".", 1)[1]: list(s) for n, s in table.items()}}


def write_vera(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 5,
    stored: bool = True, targets: Sequence[str] = make.SOME, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`stored`: the shared matrices stand in the file, a little larger than any layer."""
    rng, tensors, table = np.random.default_rng(seed), {}, linears(base_name, targets, layers)
    for name, (_, out) in table.items():
        tensors[f"{PREFIX}{name}.vera_lambda_d"] = normal(rng, r)
        tensors[f"{PREFIX}{name}.vera_lambda_b"] = normal(rng, out) * 0.5
    if stored:
        widest, tallest = (2 + max(size[i] for size in table.values()) for i in (0, 1))
        tensors["base_model.vera_A"] = _a(rng, r, widest)
        tensors["base_model.vera_B"] = normal(rng, tallest, r)
    config = _tuner(
        base_name, targets, "VERA", r=r, bias="none", d_initial=0.1, fan_in_fan_out=False,
        projection_prng_key=17 + seed, save_projection=stored, vera_dropout=0.0,
    )  # fmt: skip
    return _save(folder, config, tensors, _sizes(base_name, targets, bool(seed % 2)))


def write_vblora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 2,
    vectors: int = 11, length: int = 16, k: int = 2, only_topk: bool = False,
    targets: Sequence[str] = ("k_proj", "v_proj"), layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`only_topk`: in place of the logits, which vectors they chose and with which weights."""
    rng = np.random.default_rng(seed)
    tensors = {"base_model.vblora_vector_bank": normal(rng, vectors, length) * 0.3}
    for name, (width, out) in linears(base_name, targets, layers).items():
        for side, pieces in (("A", (r, width // length)), ("B", (out // length, r))):
            stem = f"{PREFIX}{name}.vblora_logits_{side}"
            logits = normal(rng, *pieces, vectors)
            if only_topk:
                top, chosen = logits.topk(k, dim=-1)
                tensors[f"{stem}_topk_indices"] = chosen.to(pick(rng, [torch.uint8, torch.int64]))
                tensors[f"{stem}_topk_weights"] = top.softmax(-1)[..., :-1].contiguous()
            else:
                tensors[stem] = logits
    config = _tuner(
        base_name, targets, "VBLORA", r=r, bias="none", fan_in_fan_out=False, topk=k,
        num_vectors=vectors, vector_length=length, save_only_topk_weights=only_topk,
        init_logits_std=0.1, init_vector_bank_bound=0.02, vblora_dropout=0.0,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_delora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 5,
    patterns: bool = True, targets: Sequence[str] = make.SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    rng, tensors = np.random.default_rng(seed), {}
    first = targets[0] if patterns else ""
    for name, (width, out) in linears(base_name, targets, layers).items():
        rank, stem = r + 2 if name.endswith(f".{first}") else r, f"{PREFIX}{name}.delora_"
        tensors[f"{stem}A"] = _a(rng, rank, width)
        tensors[f"{stem}B"] = normal(rng, out, rank)
        tensors[f"{stem}lambda"] = normal(rng, 1) + 5
        tensors[f"{stem}w_norm"] = normal(rng, width).abs()
    config = _tuner(
        base_name, targets, "DELORA", r=r, delora_lambda=15, bias="none", module_dropout=0.0,
        rank_pattern={first: r + 2} if first else {}, lambda_pattern={},
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_miss(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 7,
    mini: int | None = None, targets: Sequence[str] = make.SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`mini`: columns of the block that the output repeats."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (_, out) in linears(base_name, targets, layers).items():
        tensors[f"{PREFIX}{name}.miss_block"] = normal(rng, r, mini or out) * 0.02
    config = _tuner(
        base_name, targets, "MISS", r=r, bias="none", mini_r=mini or 1, miss_dropout=0.0,
        init_weights="mini" if mini else True,
        layers_to_transform=None if layers is None else list(layers),
    )  # fmt: skip
    return _save(folder, config, tensors, _sizes(base_name, targets, bool(seed % 2)))


def write_gralora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 6,
    k: int = 2, hybrid: int = 0, alpha: float = 5, targets: Sequence[str] = make.SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """k divides r and the layers' sizes; `hybrid` ranks of an ordinary LoRA stand beside."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        stem = f"{PREFIX}{name}.gralora_"
        tensors[f"{stem}A"] = normal(rng, k, width // k, r) / math.sqrt(width)
        tensors[f"{stem}B"] = normal(rng, k, r, out // k) * STRENGTH
        if hybrid:
            tensors[f"{stem}A_general.weight"] = _a(rng, hybrid, width)
            tensors[f"{stem}B_general.weight"] = _b(rng, out, hybrid)
    config = _tuner(
        base_name, targets, "GRALORA", r=r, alpha=alpha, bias="none", fan_in_fan_out=False,
        gralora_dropout=0.0, gralora_k=k, hybrid_r=hybrid,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_nola(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 3,
    basis: int = 9, alpha: float = 7, targets: Sequence[str] = make.SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        frozen = {"A": _a(rng, r, width), "B": _b(rng, out, r)}
        for side, matrix in frozen.items():
            stem = f"{PREFIX}{name}.lora_{side}."
            tensors[f"{stem}weight"] = matrix
            tensors[f"{stem}seed"] = torch.tensor([int(rng.integers(1 << 40))])
            tensors[f"{stem}coefficients"] = normal(rng, basis) * 0.1
    config = make._later_peft(
        base_name, targets, r=r, lora_alpha=alpha, use_nola=True, nola_num_basis=basis
    )
    return _save(folder, config, tensors, {"device": "cpu"} if seed % 2 else None)


def write_unilora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 3,
    theta: int = 37, targets: Sequence[str] = make.SOME, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    rng = np.random.default_rng(seed)
    tensors = {"base_model.unilora_theta_d": normal(rng, theta) * 0.2}
    for name, (width, out) in linears(base_name, targets, layers).items():
        for side, shape in (("A", (r, width)), ("B", (out, r))):
            index = torch.from_numpy(rng.integers(0, theta, shape))
            tensors[f"{PREFIX}{name}.unilora_indices_{side}"] = index
            tensors[f"{PREFIX}{name}.unilora_scales_{side}"] = normal(rng, *shape).abs()
    config = _tuner(
        base_name, targets, "UNILORA", r=r, bias="none", fan_in_fan_out=False,
        init_theta_d_bound=0.02, proj_seed=42, save_indices=True, theta_d_length=theta,
        unilora_dropout=0.0,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_a_native(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, experts: int = 3,
    r: int = 2, k: int = 2, targets: Sequence[str] = make.SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """Layers with four kinds of gate, or none."""
    head = GateSpec(
        source="router", blocks=(r,) * experts, score="softmax", bias="select", select="threshold",
        threshold=0.4, threshold_head=True,
    )  # fmt: skip
    own = GateSpec(
        source="self", blocks=(1,) * (r * experts), score="l2", select="top_k", k=k,
        weight="softmax", temperature=0.1, mask_below=0.1,
    )  # fmt: skip
    nearest = GateSpec(source="prototype", blocks=(r, 1), score="abs", select="top_p", top_p=0.7)
    config = AutoConfig.from_pretrained(FIXTURES / "bases" / base_name)
    specs = [router_spec(experts, r, k), head, own, nearest, GateSpec()]
    return write_native(random_adapter(config, seed, specs, targets, layers), folder)


class Format(NamedTuple):
    """How a format is written: its writer, and what of its shape is drawn at random.

    `system` is the reader's name where it is not the format's.
    """

    write: Callable[..., Path]
    shape: Callable[[Rng], Shape]
    system: str = ""


def _experts(rng: Rng) -> Shape:
    return {"experts": pick(rng, EXPERTS), "r": pick(rng, RANKS), "alpha": pick(rng, SCALES)}


def _with_k(rng: Rng, **more: Any) -> Shape:
    shape = _experts(rng)
    return shape | {"k": int(rng.integers(1, shape["experts"] + 1)), **more}


def _smora(rng: Rng) -> Shape:
    r = pick(rng, RANKS)
    return {
        "r": r, "k": int(rng.integers(1, r + 1)), "partition": pick(rng, (1, 3)),
        "alpha": pick(rng, SCALES), "use_rslora": bool(rng.random() < 0.3),
    }  # fmt: skip


def _flylora(rng: Rng) -> Shape:
    r = pick(rng, RANKS)
    return {
        "r": r, "k": int(rng.integers(1, r + 1)), "alpha": pick(rng, SCALES),
        "select": pick(rng, ("signed", "abs")), "use_rslora": bool(rng.random() < 0.5),
    }  # fmt: skip


def _moram(rng: Rng) -> Shape:
    r, bank, fresh = pick(rng, RANKS), pick(rng, (3, 7, 12)), bool(rng.random() < 0.7)
    k = int(rng.integers(1, bank + r * fresh + 1))
    return {
        "r": r, "bank": bank, "fresh": fresh, "alpha": pick(rng, SCALES), "k": k,
        "moram_topk": pick(rng, (None, k)), "tau": pick(rng, (0.03, 0.2, 1.0)),
        "delta": pick(rng, (0, 0.1, 0.3)),
    }  # fmt: skip


def _mola(rng: Rng) -> Shape:
    experts = [pick(rng, EXPERTS) for _ in range(3)]
    k: Any = [int(rng.integers(1, e + 1)) for e in experts]
    return {
        "experts": experts, "r": [pick(rng, RANKS) for _ in range(3)], "alpha": pick(rng, SCALES),
        "k": pick(rng, (k, min(k))),
    }  # fmt: skip


def _mixlora(rng: Rng) -> Shape:
    shape = _with_k(rng, use_rslora=bool(rng.random() < 0.4))
    shape["act_fn"] = pick(rng, (None, "silu", "gelu", "relu"))
    if rng.random() < 0.3:
        shape["expert_lora"] = {"r": pick(rng, (2, 5)), "lora_alpha": 9, "use_rslora": True}
    if rng.random() < 0.4:
        shape |= {
            "top_p": pick(rng, (0.3, 0.6, 0.8)), "temperature": pick(rng, (0.0, 0.7, 1.5))
        }  # fmt: skip
    return shape


def _meteora(rng: Rng) -> Shape:
    shape = _with_k(rng, temperature=pick(rng, (1.0, 15, 0.5)), scaling=bool(rng.random() < 0.5))
    return shape | {"alphas": (shape.pop("alpha"), 7, 2.5)}


def _arrow(rng: Rng) -> Shape:
    shape = _with_k(rng, temperature=pick(rng, (1.0, 0.2, 3.0)), general=pick(rng, (0, 1, 2)))
    shape |= {"alphas": (shape.pop("alpha"), 7, 2.5), "rng_seed": int(rng.integers(1 << 40))}
    exact = bool(rng.random() < 0.3)  # the exact singular vectors need no seed
    return shape | ({"prototypes": "svd", "rng_seed": None} if exact else {})


def _lora_mixer(rng: Rng) -> Shape:
    ranks = [pick(rng, RANKS) for _ in range(pick(rng, EXPERTS))]
    settings = {"temperature": pick(rng, (0.5, 2.5)), "renormalise": bool(rng.random() < 0.5)}
    return {
        "ranks": ranks, "k": int(rng.integers(1, len(ranks) + 1)), "use_rslora": True,
        "settings": pick(rng, (None, settings)),
    }  # fmt: skip


def _moelora(rng: Rng, per_module: bool) -> Shape:
    tasks = pick(rng, (1, 2, 5))
    return {
        "experts": pick(rng, EXPERTS), "expert_rank": pick(rng, (1, 3)), "tasks": tasks,
        "width": pick(rng, (5, 10)), "alpha": pick(rng, (24, 5.5)), "per_module": per_module,
        "task_id": int(rng.integers(0, tasks + 1)),
    }  # fmt: skip


def _poly(rng: Rng) -> Shape:
    tasks = pick(rng, (1, 2, 5))
    return {
        "r": pick(rng, RANKS), "tasks": tasks, "skills": pick(rng, EXPERTS),
        "splits": pick(rng, (1, 2, 8)), "task_id": int(rng.integers(0, tasks)),
    }  # fmt: skip


def _mole(rng: Rng) -> Shape:
    shape = _with_k(rng)
    return shape | ({"k": None, "threshold": pick(rng, (0.1, 0.3))} if rng.random() < 0.5 else {})


FORMATS: dict[str, Format] = {
    "plain": Format(write_plain, lambda rng: {
        "r": pick(rng, RANKS), "alpha": pick(rng, SCALES), "use_rslora": bool(rng.random() < 0.5),
    }),
    "loramoe": Format(make.write_loramoe, _experts),
    "hydralora": Format(make.write_hydralora, _experts),
    "meteora": Format(write_meteora, _meteora),
    "smora": Format(make.write_smora, _smora),
    "flylora": Format(make.write_flylora, _flylora),
    "moram": Format(make.write_moram, _moram),
    "mola": Format(make.write_mola, _mola),
    "adamole": Format(make.write_adamole, lambda rng: _experts(rng) | {
        "max_threshold": pick(rng, (None, 0.05, 0.6)), "copies": bool(rng.random() < 0.7),
    }),
    "mole": Format(make.write_mole, _mole),
    "loramoe_moepeft": Format(make.write_loramoe_moepeft, lambda rng: _experts(rng) | {
        "use_rslora": bool(rng.random() < 0.5),
    }),
    "mola_moepeft": Format(make.write_mola_moepeft, lambda rng: _with_k(
        rng, use_rslora=bool(rng.random() < 0.5))),
    "mixlora": Format(write_mixlora, _mixlora),
    "mixlora_legacy": Format(
        write_mixlora, lambda rng: _with_k(rng, legacy=True), "mixlora"),
    "lora_mixer": Format(multi.write_lora_mixer, _lora_mixer),
    "moelora": Format(multi.write_moelora, lambda rng: _moelora(rng, False)),
    "moelora_per_module": Format(
        multi.write_moelora, lambda rng: _moelora(rng, True), "moelora"),
    "poly": Format(multi.write_poly, _poly),
    "arrow": Format(multi.write_arrow, _arrow),
    "native": Format(write_a_native, lambda rng: {"experts": pick(rng, (2, 3, 5)), "k": 2}),
    "adalora": Format(write_adalora, lambda rng: {
        "init_r": pick(rng, RANKS), "alpha": pick(rng, (0, *SCALES)),
    }),
    "delora": Format(write_delora, lambda rng: {"r": pick(rng, RANKS)}),
    "gralora": Format(write_gralora, lambda rng: {
        "r": pick(rng, (4, 8)), "k": pick(rng, (2, 4)), "hybrid": pick(rng, (0, 3)),
        "alpha": pick(rng, SCALES),
    }),
    "loha": Format(write_loha, lambda rng: {
        "r": pick(rng, (3, 5)), "alpha": pick(rng, SCALES), "patterns": bool(rng.random() < 0.7),
    }),
    "lokr": Format(write_lokr, lambda rng: {
        "r": pick(rng, (1, 2, 3)), "alpha": pick(rng, SCALES), "both": bool(rng.random() < 0.5),
        "whole": bool(rng.random() < 0.2), "factor": pick(rng, (4, 8)),
    }),
    "miss": Format(write_miss, lambda rng: {
        "r": pick(rng, (3, 7)), "mini": pick(rng, (None, 4)),
    }),
    "vblora": Format(write_vblora, lambda rng: {
        "r": pick(rng, RANKS), "k": pick(rng, (1, 2, 3)), "vectors": pick(rng, (5, 11)),
    }),
    "vblora_topk": Format(write_vblora, lambda rng: {
        "r": pick(rng, RANKS), "k": pick(rng, (1, 2, 3)), "only_topk": True,
    }, "vblora"),
    "vera": Format(write_vera, lambda rng: {
        "r": pick(rng, RANKS), "stored": bool(rng.random() < 0.7),
    }),
    "nola": Format(write_nola, lambda rng: {
        "r": pick(rng, RANKS), "alpha": pick(rng, SCALES), "basis": pick(rng, (1, 9)),
    }),
    "unilora": Format(write_unilora, lambda rng: {"r": pick(rng, RANKS)}),
}  # fmt: skip
# PEFT's LoRA beside the base weight that it saves along is `plain` too; it has tests of its own.


def system_of(name: str) -> str:
    """The reader's name of a format."""
    return FORMATS[name].system or name


def write_random(
    name: str, folder: str | Path, seed: int, base_name: str = "base_llama", small: bool = False
) -> Path:
    """An adapter of format `name` whose shape, layers and targets depend on `seed` only.

    Args:
        small: one or two linears of one or two layers.
    """
    # Not the stream of the writers, which start from `seed` too.
    rng, form = np.random.default_rng([seed, len(name)]), FORMATS[name]
    depth = 2 if base_name == "base_qwen2" else 3
    shape = form.shape(rng)
    targets = list(rng.permutation(TARGETS)[: int(rng.integers(1, 3 if small else 5))])
    if system_of(name) == "mixlora" and not set(targets) & set(MLP):
        targets.append(pick(rng, MLP))
    layers = sorted(rng.permutation(depth)[: int(rng.integers(1, depth + (not small)))].tolist())
    return form.write(
        folder, seed, base_name, **shape, targets=[str(t) for t in targets], layers=layers
    )
