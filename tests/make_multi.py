"""Random adapters that are made of several: experts in subfolders, or one LoRA per task id.

    folder = write_arrow(tmp_path / "a", 3, "base_qwen2", experts=5, general=2)

Every writer makes a complete folder, `routing.json` included. `shape` is the system's own; also:

    targets   last parts of the adapted layers' names
    layers    numbers of the adapted layers; None is all of them
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_adapters import normal
from make_routed import linears
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
ATTENTION = ("q_proj", "v_proj", "o_proj")
SOME = ("q_proj", "k_proj", "up_proj", "down_proj")
STRENGTH = 0.15  # root mean square of B


def _save(folder: Path, config: dict[str, Any] | None, tensors: Tensors | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _settings(folder: Path, **settings: Any) -> Path:
    (folder / "routing.json").write_text(json.dumps(settings))
    return folder


def write_plain(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 3,
    alpha: float = 4, use_rslora: bool = False, targets: Sequence[str] = SOME,
    layers: Sequence[int] | None = None, half: bool = False,
) -> Path:  # fmt: skip
    """An ordinary LoRA as PEFT 0.21 saves it; `half` stores bfloat16."""
    rng, tensors = np.random.default_rng(seed), {}
    dtype = torch.bfloat16 if half else torch.float32
    for name, (width, out) in linears(base_name, targets, layers).items():
        a_RK, b_NR = normal(rng, r, width) / math.sqrt(width), normal(rng, out, r) * STRENGTH
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_RK.to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_NR.to(dtype)
    config = {
        "peft_type": "LORA", "peft_version": "0.21.2", "base_model_name_or_path": base_name,
        "r": r, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": use_rslora, "target_modules": list(targets), "task_type": "CAUSAL_LM",
        "bias": "none", "inference_mode": True, "lora_dropout": 0.0, "arrow_config": None,
        "layers_to_transform": None if layers is None else list(layers),
    }  # fmt: skip
    return _save(Path(folder), config, tensors)


def write_arrow(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, experts: int = 4,
    general: int = 0, k: int = 2, r: int = 3, alphas: Sequence[float] = (4, 7, 2.5),
    temperature: float = 1.0, rng_seed: int | None = 11, prototypes: str | None = None,
    use_rslora: bool = False, targets: Sequence[str] = SOME, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """Experts `task_i` and general adapters `gks_i`, in turn with the scales `alphas`."""
    where = Path(folder)
    tasks = [f"task_{e}" for e in range(experts)]
    others = [f"gks_{e}" for e in range(general)]
    for i, name in enumerate(tasks + others):
        write_plain(
            where / name, 1000 * seed + i, base_name, r=r, alpha=alphas[i % len(alphas)],
            use_rslora=use_rslora and i % 2 == 0, targets=targets, layers=layers,
        )  # fmt: skip
    given: dict[str, Any] = {
        "task_adapter_names": tasks, "top_k": k, "router_temperature": temperature,
    }  # fmt: skip
    if general:
        given |= {"gks_adapter_names": others, "use_gks": True}
    if rng_seed is not None:
        given["rng_seed"] = rng_seed
    if prototypes is not None:
        given["prototypes"] = prototypes
    return _settings(where, **given)


def write_lora_mixer(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *,
    ranks: Sequence[int] = (3, 5, 2), alphas: Sequence[float] = (4, 7, 2.5), k: int = 2,
    use_rslora: bool = False, settings: dict[str, Any] | None = None, prefix: str = "",
    targets: Sequence[str] = ATTENTION, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """One expert per rank; `settings` are renormalise and temperature."""
    where, names = Path(folder), [f"expert_{e}" for e in range(len(ranks))]
    for e, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        write_plain(
            where / name, 1000 * seed + e, base_name, r=rank, alpha=alphas[e % len(alphas)],
            use_rslora=use_rslora and e % 2 == 1, targets=targets, layers=layers,
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    routers = {
        f"{prefix}{name}.router.weight": normal(rng, len(ranks), width) * (1.5 / math.sqrt(width))
        for name, (width, _) in linears(base_name, targets, layers).items()
    }
    _save(where, None, routers)
    return _settings(where, system="lora-mixer", expert_order=names, top_k=k, **(settings or {}))


def write_moelora(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, experts: int = 4,
    expert_rank: int = 3, tasks: int = 2, width: int = 10, alpha: float = 24, task_id: int = 1,
    per_module: bool = False, targets: Sequence[str] = ATTENTION,
    layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`per_module` is the layout MMOELORA, else MMOELORAS with dead copies in every module."""
    rng, tensors = np.random.default_rng(seed), {}

    def gate(stem: str) -> None:
        tensors[f"{stem}lora_gate.GateL.weight"] = normal(rng, experts, width)
        tensors[f"{stem}lora_task_embedding.weight"] = normal(rng, tasks + 1, width)

    for name, (k, n) in linears(base_name, targets, layers).items():
        stem = f"{PREFIX}{name}."
        gate(stem)
        for e in range(experts):
            a_RK = normal(rng, expert_rank, k) / math.sqrt(k)
            b_NR = normal(rng, n, expert_rank) * STRENGTH
            for copy in (".mlp", ""):
                tensors[f"{stem}lora_A.loraA.{e}{copy}.weight"] = a_RK.clone()
                tensors[f"{stem}lora_B.loraB.{e}{copy}.weight"] = b_NR.clone()
    if not per_module:
        gate("")
    config = {
        "base_model_name_or_path": base_name, "bias": "none", "expert_num": experts,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "lora_alpha": alpha, "lora_dropout": 0.1, "modules_to_save": None,
        "peft_type": "MMOELORA" if per_module else "MMOELORAS", "r": experts * expert_rank,
        "target_modules": list(targets), "task_embedding_dim": width, "task_num": tasks,
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return _settings(_save(Path(folder), config, tensors), task_id=task_id)


def write_poly(
    folder: str | Path, seed: int = 0, base_name: str = "base_llama", *, r: int = 3,
    tasks: int = 3, skills: int = 5, splits: int = 1, task_id: int = 1,
    targets: Sequence[str] = ATTENTION, layers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """`splits` must divide the layers' sizes; more than one is multi-head routing."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (k, n) in linears(base_name, targets, layers).items():
        stem = f"{PREFIX}{name}.poly_"
        tensors[f"{stem}lora_A"] = normal(rng, splits, skills, k // splits, r) * (2 / math.sqrt(k))
        tensors[f"{stem}lora_B"] = normal(rng, splits, skills, r, n // splits)
        tensors[f"{stem}router.module_logits"] = normal(rng, tasks, splits * skills)
    config = {
        "auto_mapping": None, "base_model_name_or_path": base_name, "exclude_modules": None,
        "inference_mode": True, "init_weights": True, "modules_to_save": None,
        "n_skills": skills, "n_splits": splits, "n_tasks": tasks, "peft_type": "POLY",
        "peft_version": "0.21.2", "poly_type": "poly", "r": r, "revision": None,
        "target_modules": list(targets), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return _settings(_save(Path(folder), config, tensors), task_id=task_id)
