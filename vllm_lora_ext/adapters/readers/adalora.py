"""AdaLoRA (arXiv 2303.10512), as PEFT saves it: an SVD-shaped LoRA whose ranks were pruned.

    y = W x + alpha / (init_r + 1e-5) · B (E ⊙ (A x))

The scale is not alpha/r: PEFT divides by `ranknum`, which it sets to init_r and does not save.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import read_peft_config
from vllm_lora_ext.adapters.readers.tuners import take_shaped, whole

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ABE]|ranknum)")
_KEYS = (
    "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit",
    "total_step",
)  # fmt: skip


def read(folder: AdapterFolder) -> RoutedAdapter:
    # rank_pattern says which ranks were kept: saving has already removed the others.
    config = read_peft_config(
        {**folder.config, "rank_pattern": {}}, also=_KEYS, accepted=folder.accepted
    )
    init_r = whole(folder.config, "init_r")
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        a_name, b_name, e_name = (part(parts, f"lora_{p}", name) for p in "ABE")
        e_shape, a_shape, b_shape = (folder.shape(tensor) for tensor in (e_name, a_name, b_name))
        rank = e_shape[0] if e_shape else -1
        if e_shape != (rank, 1) or a_shape[:1] != (rank,) or b_shape[1:] != (rank,):
            raise rank_mismatch(
                name,
                (*a_shape, *b_shape, *e_shape),
                "lora_A [r, in], lora_B [out, r], lora_E [r, 1]",
            )
        e_R1 = folder.take(e_name)
        a_RK, b_NR = folder.take(a_name) * e_R1, folder.take(b_name)
        divisor = float(init_r)
        if "ranknum" in parts:
            divisor = float(take_shaped(folder, parts["ranknum"], 1))
        scale = (config.alpha if config.alpha > 0 else float(rank)) / (divisor + 1e-5)
        kept = torch.nonzero(e_R1[:, 0]).flatten()
        if len(kept):
            modules[name] = RoutedModule(a_RK=a_RK[kept], b_NR=b_NR[:, kept] * scale)
    return RoutedAdapter(modules, system="adalora", base_model=config.base_model)


READER = Reader(
    name="adalora",
    title="AdaLoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type ADALORA), adapter_model.safetensors with "
    "<module>.lora_A, <module>.lora_B and <module>.lora_E",
    peft_types=("ADALORA",),
    detect=of_type("ADALORA"),
    read=read,
    paper="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, "
    "https://arxiv.org/abs/2303.10512",
    summary="No gate: an ordinary LoRA whose ranks carry a learned size E; ranks with E = 0 are "
    "dropped.",
    formula="y = W x + alpha / (init_r + 1e-5) · B (E ⊙ (A x))",
    traps=(
        "The scale is alpha / (init_r + 1e-5), not alpha / r.",
        "PEFT does not save ranknum; after loading it is init_r.",
    ),
)
