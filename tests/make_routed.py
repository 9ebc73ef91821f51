"""Random adapters in the file formats of published systems, as their authors' code names things.

    folder = write_smora(tmp_path / "a", 3, "base_qwen2", r=13, k=5)

Every writer makes `adapter_config.json`, `adapter_model.safetensors` and, where the files leave
something out, `routing.json`. `shape` is the system's own: experts, ranks, k, scales. Also:

    targets   last parts of the adapted layers' names
    layers    numbers of the adapted layers; None is all of them
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_adapters import FIXTURES, linear_shapes, normal
from safetensors.torch import save_file
from transformers import AutoConfig

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
ATTENTION = ("q_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "k_proj", "up_proj", "down_proj")
STRENGTH = 0.1  # root mean square of B


@cache
def _shapes(base_name: str) -> dict[str, tuple[int, int]]:
    return linear_shapes(AutoConfig.from_pretrained(FIXTURES / "bases" / base_name))


def linears(
    base_name: str, targets: Sequence[str], layers: Sequence[int] | None = None
) -> dict[str, tuple[int, int]]:
    """Module name → (in, out) of the layers to adapt."""
    return {
        name: size
        for name, size in _shapes(base_name).items()
        if name.rsplit(".", 1)[1] in targets
        and (layers is None or int(name.split(".")[2]) in layers)
    }


def _a(rng: np.random.Generator, rank: int, width: int) -> torch.Tensor:
    return normal(rng, rank, width) / math.sqrt(width)


def _b(rng: np.random.Generator, out: int, rank: int) -> torch.Tensor:
    return normal(rng, out, rank) * STRENGTH


def _router(rng: np.random.Generator, rows: int, width: int) -> torch.Tensor:
    return normal(rng, rows, width) * (1.5 / math.sqrt(width))


def _save(
    folder: str | Path, config: dict[str, Any], tensors: Tensors,
    settings: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    (where / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, where / "adapter_model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        (where / "routing.json").write_text(json.dumps(settings))
    return where


def _early_peft(base_name: str, targets: Sequence[str], **own: Any) -> dict[str, Any]:
    """What a config of PEFT 0.3 or 0.4 holds."""
    return {
        "base_model_name_or_path": base_name, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "lora_dropout": 0.05, "modules_to_save": None,
        "peft_type": "LORA", "target_modules": list(targets), "task_type": "CAUSAL_LM", **own,
    }  # fmt: skip


def _later_peft(base_name: str, targets: Sequence[str], **own: Any) -> dict[str, Any]:
    """What forks of PEFT 0.12 to 0.15 add to it."""
    return _early_peft(base_name, targets) | {
        "alpha_pattern": {}, "auto_mapping": None, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core",
        "rank_pattern": {}, "revision": None, "use_dora": False, "use_rslora": False, **own,
    }  # fmt: skip


def write_smora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 12, k: int = 5,
    partition: int = 1, alpha: float = 7, use_rslora: bool = False,
    targets: Sequence[str] = ATTENTION, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """r ranks, k of them active, in groups of `partition` that share a router row."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _a(rng, r, width)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _b(rng, out, r)
        tensors[f"{PREFIX}{name}.lora_router.weight"] = _router(rng, r // partition, width)
        tensors[f"{PREFIX}{name}.lora_biases"] = normal(rng, r) * 0.1
    config = _later_peft(
        base_name, targets, peft_type="SRMOLE", r=r, lora_alpha=alpha, activate_r=k,
        rank_partition=partition, epsilon_greedy=False, dense_compute=False,
        use_rslora=use_rslora,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_flylora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 11, k: int = 3,
    alpha: float = 20, select: str = "signed", use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None, alpha_pattern: dict[str, float] | None = None,
    targets: Sequence[str] = SOME, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`rank_pattern` and `alpha_pattern` go by last parts of names here."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        rank = (rank_pattern or {}).get(name.rsplit(".", 1)[1], r)
        sparse = torch.from_numpy(rng.random((rank, width)) < 0.25)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = 2 * _a(rng, rank, width) * sparse
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _b(rng, out, rank)
        tensors[f"{PREFIX}{name}.lora_topk_bias"] = normal(rng, rank) * 0.3
    config = _later_peft(
        base_name, targets, r=r, lora_alpha=alpha, top_k=k, bias_u=0.001, use_rslora=use_rslora,
        init_lora_weights="sparse", lora_bias=False, rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
    )  # fmt: skip
    return _save(folder, config, tensors, {"select": select})


def write_moram(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 5,
    bank: int = 9, fresh: bool = True, alpha: float = 8, tau: float = 0.1, delta: float = 0.1,
    k: int = 4, moram_topk: int | None = None,
    targets: Sequence[str] = ATTENTION, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """A bank of `bank` ranks and, when `fresh`, r new ones, whose B is not zero."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _a(rng, bank, width)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _b(rng, out, bank)
        if fresh:
            tensors[f"{PREFIX}{name}.loranew_A.weight"] = _a(rng, r, width)
            tensors[f"{PREFIX}{name}.loranew_B.weight"] = _b(rng, out, r)
    config = _early_peft(
        base_name, targets, r=r, lora_alpha=alpha, r_sum=bank, use_moram=True, use_mora=False,
        moram_topk=moram_topk, save_loranew=False, init_lora_weights=True,
    )  # fmt: skip
    settings = {"tau": tau, "delta": delta} | ({} if moram_topk is not None else {"top_k": k})
    return _save(folder, config, tensors, settings)


def write_mola(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *,
    experts: Sequence[int] = (3, 2, 5), r: Sequence[int] = (2, 3, 1), alpha: float = 5,
    k: int | Sequence[int] = (1, 2, 3), targets: Sequence[str] = SOME,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """Experts, ranks and k by layer: entries beyond the base's layers are not written."""
    depth = 1 + max(int(name.split(".")[2]) for name in _shapes(base_name))
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        layer, stem = int(name.split(".")[2]), f"{PREFIX}{name}."
        tensors[f"{stem}router.router.weight"] = _router(rng, experts[layer], width)
        for e in range(experts[layer]):
            tensors[f"{stem}lora_A_{e}.weight"] = _a(rng, r[layer], width)
            tensors[f"{stem}lora_B_{e}.weight"] = _b(rng, out, r[layer])
    config = _early_peft(
        base_name, targets, r=list(r[:depth]), lora_alpha=alpha, layers_pattern=None,
        layers_to_transform=None, init_lora_weights=True,
    )  # fmt: skip
    top_k = k if isinstance(k, int) else list(k[:depth])
    return _save(folder, config, tensors, {"number_experts": list(experts[:depth]), "top_k": top_k})


def write_loramoe(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, experts: int = 5,
    r: int = 3, alpha: float = 9, shared_a: bool = False, targets: Sequence[str] = MLP,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """With `shared_a` it is HydraLoRA's format."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        stem = f"{PREFIX}{name}."
        tensors[f"{stem}lora_route.weight"] = _router(rng, experts, width)
        for e in range(experts):
            if not shared_a or e == 0:
                tensors[f"{stem}lora_A{'' if shared_a else e}.weight"] = _a(rng, r, width)
            tensors[f"{stem}lora_B{e}.weight"] = _b(rng, out, r)
    config = _early_peft(
        base_name, targets, r=r, lora_alpha=alpha, lora_nums=experts, enable_lora=None,
        merge_weights=False,
    )  # fmt: skip
    return _save(folder, config, tensors)


def write_hydralora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", **shape: Any
) -> Path:
    return write_loramoe(folder, seed, base_name, shared_a=True, **shape)


def write_mola_moepeft(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, k: int = 3,
    targets: Sequence[str] = SOME, **shape: Any,
) -> Path:  # fmt: skip
    return _write_moe_peft(folder, seed, base_name, "mola", {"top_k": k}, targets, **shape)


def write_loramoe_moepeft(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *,
    targets: Sequence[str] = (*MLP, "q_proj"), **shape: Any,
) -> Path:  # fmt: skip
    """Attention targets are plain LoRA, as MoE-PEFT makes them."""
    return _write_moe_peft(folder, seed, base_name, "loramoe", {}, targets, **shape)


def _write_moe_peft(
    folder: str | Path, seed: int, base_name: str, method: str, own: dict[str, Any],
    targets: Sequence[str], *, experts: int = 5, r: int = 3, alpha: int = 7,
    use_rslora: bool = False, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        stem = f"{method}.{name.removeprefix('model.')}."
        plain = method == "loramoe" and ".self_attn." in name
        if not plain:
            tensors[f"{stem}moe_gate.weight"] = _router(rng, experts, width)
        for inner in [""] if plain else [f"experts.{e}." for e in range(experts)]:
            tensors[f"{stem}{inner}lora_A.weight"] = _a(rng, r, width)
            tensors[f"{stem}{inner}lora_B.weight"] = _b(rng, out, r)
    config = ({"use_rslora": True} if use_rslora else {}) | {
        "bias": "none", "peft_type": method.upper(), "r": r, "lora_alpha": alpha,
        "lora_dropout": 0.05, "target_modules": list(targets), "routing_strategy": method,
        "num_experts": experts, "base_model_name_or_path": base_name, "task_type": "CAUSAL_LM",
        **own,
    }  # fmt: skip
    return _save(folder, config, tensors)


def write_adamole(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *,
    max_threshold: float | None = None, **shape: Any,
) -> Path:  # fmt: skip
    own = {"peft_type": "ADAMOLE", "max_threshold": max_threshold}
    return _write_adamole(folder, seed, base_name, own, **shape)


def write_mole(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, k: int | None = 2,
    threshold: float | None = None, **shape: Any,
) -> Path:  # fmt: skip
    """Either `k` or, with k=None, `threshold`."""
    own = {"peft_type": "MOLE", "top_k": k, "threshold": threshold}
    return _write_adamole(folder, seed, base_name, own, **shape)


def _write_adamole(
    folder: str | Path, seed: int, base_name: str, own: dict[str, Any], *, experts: int = 5,
    r: int = 3, alpha: float = 4, copies: bool = True, targets: Sequence[str] = ATTENTION,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`copies`: write every expert again below `moe_layer`, as the authors' code does."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, out) in linears(base_name, targets, layers).items():
        stem = f"{PREFIX}{name}."
        tensors[f"{stem}lora_gating.weight"] = _router(rng, experts, width)
        if own["peft_type"] == "ADAMOLE":
            tensors[f"{stem}lora_threshold.weight"] = _router(rng, 1, width)
            tensors[f"{stem}lora_threshold.bias"] = normal(rng, 1)
        for e in range(experts):
            pair = {"A": _a(rng, r, width), "B": _b(rng, out, r)}
            for letter, matrix in pair.items():
                tensors[f"{stem}lora_{letter}.{e}.weight"] = matrix
                if copies:
                    copy = f"{stem}moe_layer.experts.{e}.lora_{letter}.weight"
                    tensors[copy] = matrix.clone()
    config = {
        "auto_mapping": None, "base_model_name_or_path": base_name, "bias": "none",
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha,
        "lora_dropout": 0.0, "lora_rank": r, "num_experts": experts, "revision": None,
        "target_modules": list(targets), "task_type": "CAUSAL_LM", **own,
    }  # fmt: skip
    return _save(folder, config, tensors)


WRITERS = {
    "smora": write_smora, "flylora": write_flylora, "moram": write_moram, "mola": write_mola,
    "loramoe": write_loramoe, "hydralora": write_hydralora, "adamole": write_adamole,
    "mole": write_mole, "loramoe_moepeft": write_loramoe_moepeft,
    "mola_moepeft": write_mola_moepeft,
}  # fmt: skip
