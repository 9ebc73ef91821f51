"""ScaleZero's dynamic parameter scaling (LightZero): a prefix of adapters, each with a gate.

y = α_0 W x + b + sum_{j < stage} α_j alpha/r B_j A_j x,   α = offset + range · tanh(logit); the
offset is `lora_scale_init` for the adapters and 1 for the base.
"""

from __future__ import annotations

import math
import re

import torch

from vllm_lora_ext.adapters.folder import missing_tensor
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import whole_number
from vllm_lora_ext.adapters.readers.tuners import bad_shape
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.ops.scale import number
from vllm_lora_ext.merging.variants.conversion import Conversion

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>weight|bias|base_weight_scale\.logit"
    r"|adapters\.\d+\.lora_[AB]|adapter_scales\.\d+\.logit)"
)
_SIZE = 1e-6  # a base gate nearer to 1 than this is taken for 1


def curriculum(conversion: Conversion) -> Factors:
    """The state after `stage` adapters.

    Settings: `stage`, `lora_alpha`, and optionally `lora_scale_init` (1), `scale_range` (0.2).
    A base gate other than 1 needs the output multiplier, or has full rank.
    """
    stage = whole_number(
        conversion.folder.setting("stage", "how many adapters count"), "stage", 0, 999
    )
    alpha = conversion.folder.setting("lora_alpha", "lora_alpha of the training config")
    alpha = number(alpha, "lora_alpha")
    offset = number(conversion.setting("lora_scale_init", 1.0), "lora_scale_init")
    reach = number(conversion.setting("scale_range", 0.2), "scale_range")
    modules = {}
    for name, names in group(conversion.folder.names, _PART).items():
        if "base_weight_scale.logit" not in names:
            continue
        parts = {key: conversion.folder.take(tensor) for key, tensor in names.items()}
        pair = _prefix(name, names, parts, stage, (alpha, offset, reach))
        # The base's gate begins at 1, whatever the adapters' begin with; stage 0 has none.
        alpha_0 = _gate(parts["base_weight_scale.logit"], 1.0, reach) if stage else 1.0
        if abs(alpha_0 - 1) <= _SIZE:
            modules[name] = pair
        elif conversion.multipliers:
            conversion.out_scale[name] = torch.full((pair.b_NR.shape[0],), alpha_0)
            modules[name] = Pair(pair.a_RK, pair.b_NR / alpha_0)
        else:
            whole = parts["weight"] * (alpha_0 - 1) + pair.delta()
            modules[name] = conversion.dense(name, whole)
    conversion.notes.append("the base is this checkpoint's own `weight`, which stage 0 trained")
    conversion.folder.skip(conversion.folder.names)
    return Factors(modules)


def _prefix(
    module: str, names: dict[str, str], parts: dict[str, torch.Tensor], stage: int,
    settings: tuple[float, float, float],
) -> Pair:  # fmt: skip
    alpha, offset, reach = settings
    out, width = parts["weight"].shape if "weight" in parts else (0, 0)
    a_parts, b_parts = [torch.zeros(0, width)], [torch.zeros(out, 0)]
    for j in range(stage):
        for wanted in (f"adapters.{j}.lora_A", f"adapters.{j}.lora_B", f"adapter_scales.{j}.logit"):
            part(names, wanted, module)
        a_RK, b_NR = parts[f"adapters.{j}.lora_A"], parts[f"adapters.{j}.lora_B"]
        if a_RK.shape[0] != b_NR.shape[1]:
            raise bad_shape(f"{module}.adapters.{j}.lora_B", tuple(b_NR.shape), "[out, r]")
        gate = _gate(parts[f"adapter_scales.{j}.logit"], offset, reach)
        a_parts.append(a_RK)
        b_parts.append(b_NR * (gate * alpha / a_RK.shape[0]))
    if not width:
        raise missing_tensor(f"{module}.weight")
    return Pair(torch.cat(a_parts), torch.cat(b_parts, dim=1))


def _gate(logit: torch.Tensor, offset: float, reach: float) -> float:
    return offset + reach * math.tanh(float(logit))
