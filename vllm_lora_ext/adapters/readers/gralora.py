"""GraLoRA (arXiv 2505.20355), as PEFT saves it: k × k blocks, each with a small LoRA of its own.

Block column n has A_n [in/k, r], block row m has B_m [r, out/k]; with s = r/k, block (m, n) uses
ranks m·s .. of A_n and ranks n·s .. of B_m. All of them together are one LoRA of rank k·r.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import bad_value, read_peft_config
from vllm_lora_ext.adapters.readers.tuners import (
    number,
    read_tuner_config,
    require,
    take_shaped,
    whole,
)

_PART = re.compile(r"(?P<module>.+)\.(?P<part>gralora_[AB](_general)?)(\.weight)?")
_KEYS = ("alpha", "gralora_dropout", "gralora_k", "hybrid_r", "r", "rank_pattern")


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    k, hybrid = whole(folder.config, "gralora_k"), whole(folder.config, "hybrid_r", 0)
    alpha = number(folder.config, "alpha")
    ranks = read_peft_config({
        "r": require(folder.config, "r"), "lora_alpha": 1,
        "rank_pattern": folder.config.get("rank_pattern") or {},
    })  # fmt: skip
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        rank = ranks.rank(name)
        if rank % k:
            raise bad_value(f"r of {name}", rank, f"a multiple of gralora_k {k}")
        a_GKR = take_shaped(folder, part(parts, "gralora_A", name), k, None, rank)
        b_GRN = take_shaped(folder, part(parts, "gralora_B", name), k, rank, None)
        folder.reserve(k * rank * k * (a_GKR.shape[1] + b_GRN.shape[2]))
        a_RK, b_NR = blocks(a_GKR, b_GRN)
        if hybrid:
            a_name, b_name = (part(parts, f"gralora_{p}_general", name) for p in "AB")
            a_general = take_shaped(folder, a_name, hybrid, a_RK.shape[1])
            b_general = take_shaped(folder, b_name, b_NR.shape[0], hybrid)
            a_RK, b_NR = torch.cat([a_RK, a_general]), torch.cat([b_NR, b_general], dim=1)
        modules[name] = RoutedModule(a_RK=a_RK, b_NR=b_NR * (alpha / (rank + hybrid)))
    return RoutedAdapter(modules, system="gralora", base_model=base_model)


def blocks(a_GKR: torch.Tensor, b_GRN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of rank k·r from the blocks' factors.

    Args:
        a_GKR: [k, in/k, r]; b_GRN: [k, r, out/k].
    """
    k, width, rank = a_GKR.shape
    out, small = b_GRN.shape[2], rank // k
    a = torch.zeros(k, k, small, k, width)  # [block row, block column, rank, block of in, in]
    b = torch.zeros(k, out, k, k, small)  # [block of out, out, block row, block column, rank]
    for row in range(k):
        for column in range(k):
            a[row, column, :, column] = a_GKR[column, :, row * small : (row + 1) * small].T
            b[row, :, row, column] = b_GRN[row, column * small : (column + 1) * small].T
    return a.reshape(k * rank, k * width), b.reshape(k * out, k * rank)


READER = Reader(
    name="gralora",
    title="GraLoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type GRALORA), adapter_model.safetensors with "
    "<module>.gralora_A and <module>.gralora_B",
    peft_types=("GRALORA",),
    detect=of_type("GRALORA"),
    read=read,
    paper="GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, "
    "https://arxiv.org/abs/2505.20355",
    summary="No gate: a grid of small LoRAs over blocks of the weight, together one LoRA.",
    formula="y_m = (W x)_m + alpha/(r + hybrid_r) · sum_n B_mn A_mn x_n  (+ an ordinary LoRA)",
    traps=("It is served at rank k·r (+ hybrid_r), not r.",),
)
