"""Random adapters made, saved and run by PEFT itself: whose numbers `--measure` compares ours with.

For the systems of PEFT that have no recorded fixture. Nothing of them is kept: they are made
again at every measurement, from a seed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch

SOME = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PROMPTS, LENGTH = 4, 40
STEPS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
WANTED = 0.2  # mean change of a logit
TASK = 1

Logits = Callable[[torch.nn.Module], torch.Tensor]

CONFIGS: dict[str, peft.PeftConfig] = {
    "adalora": peft.AdaLoraConfig(
        init_r=7, target_r=5, lora_alpha=12, total_step=10, target_modules=SOME
    ),
    "delora": peft.DeloraConfig(r=6, target_modules=SOME, rank_pattern={"o_proj": 3}),
    "gralora": peft.GraloraConfig(r=6, gralora_k=2, hybrid_r=3, alpha=9, target_modules=SOME),
    "loha": peft.LoHaConfig(r=3, alpha=7, target_modules=SOME, rank_pattern={"up_proj": 2}),
    "lokr": peft.LoKrConfig(r=3, alpha=7, decompose_factor=4, target_modules=SOME),
    "miss": peft.MissConfig(r=7, target_modules=SOME),
    "unilora": peft.UniLoraConfig(
        r=6, theta_d_length=211, save_indices=True, target_modules=SOME
    ),
    "vblora": peft.VBLoRAConfig(
        r=6, num_vectors=50, vector_length=16, topk=3, save_only_topk_weights=True,
        target_modules=SOME,
    ),
    "vera": peft.VeraConfig(r=12, target_modules=SOME),
    "poly": peft.PolyConfig(
        task_type="CAUSAL_LM", r=6, n_tasks=3, n_skills=5, n_splits=2, target_modules=SOME
    ),
}  # fmt: skip


def prompts(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, vocabulary, (1, LENGTH), generator=generator) for _ in range(PROMPTS)]


def adapters(
    base: torch.nn.Module, place: Path
) -> Iterator[tuple[str, Path, dict[str, Any], list[torch.Tensor]]]:
    """(system, folder that PEFT saved, settings it leaves out, PEFT's logits of `prompts`)."""
    ids = prompts(base.config.vocab_size)
    plain = [base(i).logits for i in ids]
    for name, config in CONFIGS.items():
        model = _trained(base, config, ids, plain)
        folder = place / name
        model.save_pretrained(folder)
        yield name, folder, _settings(name, base), [_run(model, i) for i in ids]
    yield _arrow(base, place, ids, plain)


def _trained(
    base: torch.nn.Module, config: peft.PeftConfig, ids: list[torch.Tensor],
    plain: list[torch.Tensor],
) -> torch.nn.Module:  # fmt: skip
    """Noise on every trainable tensor, as much as it takes to move the logits."""
    for step in STEPS:
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data += torch.randn(weight.shape) * step
            if "lora_E" in name:
                weight.data[::3] = 0  # ranks that training pruned
        if _effect([_run(model, i) for i in ids], plain) > WANTED:
            return model
    raise RuntimeError(f"{config.peft_type}: nothing moves the logits")


def _effect(logits: list[torch.Tensor], plain: list[torch.Tensor]) -> float:
    return sum(float((a - b).abs().mean()) for a, b in zip(logits, plain, strict=True)) / PROMPTS


def _run(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    by_task = model.active_peft_config.peft_type == "POLY"
    return model(input_ids=ids, **({"task_ids": torch.tensor([TASK])} if by_task else {})).logits


def _settings(name: str, base: torch.nn.Module) -> dict[str, Any]:
    if name == "poly":
        return {"task_id": TASK}
    if name in ("miss", "vera"):
        linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        return {"sizes": {n: [m.in_features, m.out_features] for n, m in linears.items()}}
    return {}


def _arrow(
    base: torch.nn.Module, place: Path, ids: list[torch.Tensor], plain: list[torch.Tensor]
) -> tuple[str, Path, dict[str, Any], list[torch.Tensor]]:
    """Four experts and two general adapters, with GenKnowSub."""
    folder, names = place / "arrow", [f"task_{e}" for e in range(4)] + ["general_0", "general_1"]
    config = peft.LoraConfig(r=6, lora_alpha=12, target_modules=SOME)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
        for weight in (w for w in model.parameters() if w.requires_grad):
            weight.data = torch.randn(weight.shape) * 0.15
        model.save_pretrained(folder / name)
    router = peft.ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=42, use_gks=True)
    paths = [str(folder / name) for name in names]
    model = peft.create_arrow_model(copy.deepcopy(base), paths[:4], router, paths[4:]).eval()
    logits = [model(i).logits for i in ids]
    assert _effect(logits, plain) > WANTED
    settings = {
        "task_adapter_names": names[:4], "gks_adapter_names": names[4:], "top_k": 2,
        "router_temperature": 1.0, "rng_seed": 42, "use_gks": True,
    }  # fmt: skip
    (folder / "routing.json").write_text(json.dumps(settings))
    return "arrow", folder, {}, logits
