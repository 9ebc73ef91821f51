"""LoHa (arXiv 2108.06098), as PEFT saves it: the elementwise product of two low-rank matrices.

    delta = alpha/r · (B1 A1) ⊙ (B2 A2)

It has rank r²: rows A1_p ⊙ A2_q and columns B1_p ⊙ B2_q, for every pair of ranks.
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

_PART = re.compile(r"(?P<module>.+)\.(?P<part>hada_(w[12]_[ab]))")
_KEYS = ("alpha", "alpha_pattern", "r", "rank_pattern")


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    scales = lycoris_scales(folder.config)
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        names = [part(parts, f"hada_{p}", name) for p in ("w1_a", "w1_b", "w2_a", "w2_b")]
        rank = scales.rank(name)
        b1_NR = take_shaped(folder, names[0], None, rank)
        a1_RK = take_shaped(folder, names[1], rank, None)
        b2_NR = take_shaped(folder, names[2], b1_NR.shape[0], rank)
        a2_RK = take_shaped(folder, names[3], rank, a1_RK.shape[1])
        smaller = min(rank * rank, b1_NR.shape[0], a1_RK.shape[1])
        folder.reserve(2 * smaller * (b1_NR.shape[0] + a1_RK.shape[1]))
        a_RK, b_NR = hadamard(b1_NR, a1_RK, b2_NR, a2_RK)
        modules[name] = RoutedModule(a_RK=a_RK, b_NR=b_NR * scales.scale(name))
    return RoutedAdapter(modules, system="loha", base_model=base_model)


def hadamard(
    b1_NR: torch.Tensor, a1_RK: torch.Tensor, b2_NR: torch.Tensor, a2_RK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of `(B1 A1) ⊙ (B2 A2)`, of rank r1·r2, or of full rank where that is smaller.

    Args:
        b1_NR, a1_RK: [out, r1], [r1, in]; b2_NR, a2_RK: [out, r2], [r2, in].
    """
    (out, r1), (r2, width) = b1_NR.shape, a2_RK.shape
    if r1 * r2 >= min(out, width):
        return identity_factors((b1_NR @ a1_RK) * (b2_NR @ a2_RK))
    a_RK = (a1_RK[:, None] * a2_RK[None]).reshape(r1 * r2, width)
    return a_RK, (b1_NR[:, :, None] * b2_NR[:, None]).reshape(out, r1 * r2)


READER = Reader(
    name="loha",
    title="LoHa (PEFT)",
    url="https://github.com/KohakuBlueleaf/LyCORIS",
    files="adapter_config.json (peft_type LOHA), adapter_model.safetensors with "
    "<module>.hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b",
    peft_types=("LOHA",),
    detect=of_type("LOHA"),
    read=read,
    paper="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, "
    "https://arxiv.org/abs/2108.06098",
    summary="No gate: the elementwise product of two LoRAs, which is a LoRA of rank r².",
    formula="y = W x + alpha/r · ((B1 A1) ⊙ (B2 A2)) x",
    traps=(
        "It is served at rank r², so r = 16 needs --max-lora-rank 256.",
        "Convolutions (hada_t1, hada_t2) are refused.",
    ),
)
