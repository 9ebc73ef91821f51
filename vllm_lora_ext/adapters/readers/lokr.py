"""LoKr (arXiv 2309.14859), as PEFT saves it: a Kronecker product of two small matrices.

    delta = alpha/r · (W1 ⊗ W2),   each of W1, W2 stored whole or as a product

kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2), so its rank is rank(W1) · rank(W2).
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.tuners import (
    identity_factors,
    lycoris_scales,
    read_tuner_config,
    take_shaped,
)
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lokr_(w[12](_[ab])?|t2))")
_KEYS = ("alpha", "alpha_pattern", "decompose_both", "decompose_factor", "r", "rank_pattern")


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    scales = lycoris_scales(folder.config)
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        if "lokr_t2" in parts:
            raise AdapterError(
                "unsupported_feature", f"{name} is a convolution (lokr_t2), which is not served",
                seen=parts["lokr_t2"], limit="linear layers", fix="train linear layers only",
            )  # fmt: skip
        rank = scales.rank(name)
        a1, b1 = _factor(folder, name, parts, "lokr_w1", rank)
        a2, b2 = _factor(folder, name, parts, "lokr_w2", rank)
        ranks = len(a1) * len(a2)
        folder.reserve(ranks * (a1.shape[1] * a2.shape[1] + len(b1) * len(b2)))
        modules[name] = RoutedModule(
            a_RK=torch.kron(a1, a2), b_NR=torch.kron(b1, b2) * scales.scale(name)
        )
    return RoutedAdapter(modules, system="lokr", base_model=base_model)


def _factor(
    folder: AdapterFolder, module: str, parts: dict[str, str], which: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of one side of the product, at the smallest rank its shape allows."""
    if which in parts:
        return identity_factors(take_shaped(folder, parts[which], None, None))
    b = take_shaped(folder, part(parts, f"{which}_a", module), None, rank)
    a = take_shaped(folder, part(parts, f"{which}_b", module), rank, None)
    return (a, b) if a.shape[0] < min(b.shape[0], a.shape[1]) else identity_factors(b @ a)


READER = Reader(
    name="lokr",
    title="LoKr (PEFT)",
    url="https://github.com/KohakuBlueleaf/LyCORIS",
    files="adapter_config.json (peft_type LOKR), adapter_model.safetensors with <module>.lokr_w1 "
    "(or lokr_w1_a and lokr_w1_b) and <module>.lokr_w2 (or lokr_w2_a and lokr_w2_b)",
    peft_types=("LOKR",),
    detect=of_type("LOKR"),
    read=read,
    paper="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, "
    "https://arxiv.org/abs/2309.14859",
    summary="No gate: a Kronecker product, which is a LoRA of rank(W1) · rank(W2) ranks.",
    formula="y = W x + alpha/r · (W1 ⊗ W2) x",
    traps=("The rank served is rank(W1) · rank(W2), which may be far above r.",),
)
