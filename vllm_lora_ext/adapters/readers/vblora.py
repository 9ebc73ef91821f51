"""VB-LoRA (arXiv 2405.15179), as PEFT saves it: A and B pieced together from one vector bank.

Each piece of a row of A, or of a column of B, is a softmax-weighted sum of the k vectors of the
bank with the largest logits.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.tuners import (
    bad_shape,
    check_shape,
    read_tuner_config,
    take_shaped,
    whole,
)
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>vblora_logits_[AB](_topk_indices|_topk_weights)?)")
_BANK = "base_model.vblora_vector_bank"
_KEYS = (
    "init_logits_std", "init_vector_bank_bound", "num_vectors", "r", "save_only_topk_weights",
    "topk", "vblora_dropout", "vector_length",
)  # fmt: skip


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    rank, k = whole(folder.config, "r"), whole(folder.config, "topk")
    bank_VL = take_shaped(folder, _BANK, None, None)
    if k > bank_VL.shape[0]:
        raise AdapterError(
            "k_too_large", "topk in adapter_config.json is larger than the vector bank", seen=k,
            limit=bank_VL.shape[0], fix="mend topk",
        )  # fmt: skip
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        a_RTL = _pieces(folder, name, parts, "vblora_logits_A", bank_VL, k)
        b_TRL = _pieces(folder, name, parts, "vblora_logits_B", bank_VL, k)
        if a_RTL.shape[0] != rank or b_TRL.shape[1] != rank:
            seen = (a_RTL.shape[0], b_TRL.shape[1])
            raise bad_shape(f"{name}.vblora_logits", seen, f"rank {rank} on both sides")
        modules[name] = RoutedModule(
            a_RK=a_RTL.reshape(rank, -1), b_NR=b_TRL.transpose(1, 2).reshape(-1, rank)
        )
    return RoutedAdapter(modules, system="vblora", base_model=base_model)


def _pieces(
    folder: AdapterFolder, module: str, parts: dict[str, str], which: str, bank_VL: torch.Tensor,
    k: int,
) -> torch.Tensor:  # fmt: skip
    """[.., .., vector_length]: the pieces that the stored logits, or weights, choose."""
    if f"{which}_topk_indices" in parts:
        index_name = parts[f"{which}_topk_indices"]
        check_shape(index_name, folder.shape(index_name), None, None, k)
        chosen = folder.take_whole(index_name)
        weight_name = part(parts, f"{which}_topk_weights", module)
        wanted = (*chosen.shape[:2], k - 1)  # all but the last: they sum to one
        if folder.shape(weight_name) != wanted:
            raise bad_shape(weight_name, folder.shape(weight_name), str(list(wanted)))
        weights = folder.take(weight_name)
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        if not 0 <= int(chosen.min()) <= int(chosen.max()) < bank_VL.shape[0]:
            raise bad_shape(f"{module}.{which}", tuple(chosen.shape), "indices into the bank")
    else:
        logits = take_shaped(folder, part(parts, which, module), None, None, bank_VL.shape[0])
        top, chosen = logits.topk(k, dim=-1)
        weights = top.softmax(dim=-1)
    folder.reserve(2 * chosen.numel() * bank_VL.shape[1])
    return (weights[..., None] * bank_VL[chosen]).sum(-2)


READER = Reader(
    name="vblora",
    title="VB-LoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type VBLORA), adapter_model.safetensors with "
    "<module>.vblora_logits_A, <module>.vblora_logits_B (or, with save_only_topk_weights, their "
    "_topk_indices and _topk_weights) and base_model.vblora_vector_bank",
    peft_types=("VBLORA",),
    detect=of_type("VBLORA"),
    read=read,
    paper="VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, "
    "https://arxiv.org/abs/2405.15179",
    summary="No gate over tokens: A and B are pieced together once from a shared bank of vectors.",
    formula="piece = sum over the top k of softmax(logits) · bank;  y = W x + B A x",
)
