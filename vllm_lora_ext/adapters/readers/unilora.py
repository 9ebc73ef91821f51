"""Uni-LoRA (arXiv 2506.00799), as PEFT saves it: entries of one short vector, scaled.

    A = theta[index_A] ⊙ scale_A,   B = theta[index_B] ⊙ scale_B

Every layer's indices and scales are stored; the vector is shared by all layers.
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

_PART = re.compile(r"(?P<module>.+)\.(?P<part>unilora_(indices|scales)_[AB])")
_THETA = "base_model.unilora_theta_d"
_KEYS = (
    "init_theta_d_bound", "proj_seed", "r", "save_indices", "theta_d_length", "unilora_dropout",
)  # fmt: skip


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    rank = whole(folder.config, "r")
    theta_D = take_shaped(folder, _THETA, None)
    layers = group(folder.names, _PART)
    if not layers:
        raise AdapterError(
            "unsupported_feature", "Uni-LoRA without stored indices: they depend on the order of"
            " the layers in the trainer's model", seen="save_indices false",
            limit="save_indices true", fix="save it with save_indices",
        )  # fmt: skip
    modules = {}
    for name, parts in layers.items():
        a_RK = _side(folder, name, parts, "A", (rank, None), theta_D)
        b_NR = _side(folder, name, parts, "B", (None, rank), theta_D)
        modules[name] = RoutedModule(a_RK=a_RK, b_NR=b_NR)
    return RoutedAdapter(modules, system="unilora", base_model=base_model)


def _side(
    folder: AdapterFolder, module: str, parts: dict[str, str], side: str,
    shape: tuple[int | None, ...], theta_D: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    index_name = part(parts, f"unilora_indices_{side}", module)
    check_shape(index_name, folder.shape(index_name), *shape)
    index = folder.take_whole(index_name)
    if not 0 <= int(index.min()) <= int(index.max()) < len(theta_D):
        raise bad_shape(index_name, tuple(index.shape), f"indices below {len(theta_D)}")
    scale = take_shaped(folder, part(parts, f"unilora_scales_{side}", module), *index.shape)
    return theta_D[index] * scale


READER = Reader(
    name="unilora",
    title="Uni-LoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type UNILORA, save_indices true), adapter_model.safetensors "
    "with <module>.unilora_indices_A, .unilora_scales_A, the same of B, and "
    "base_model.unilora_theta_d",
    peft_types=("UNILORA",),
    detect=of_type("UNILORA"),
    read=read,
    paper="Uni-LoRA: One Vector is All You Need (arXiv 2506.00799)",
    summary="No gate: a LoRA whose every entry of A and B is one entry of a short trained vector, "
    "scaled.",
    formula="y = W x + B A x,  A = theta[index_A] ⊙ scale_A,  B = theta[index_B] ⊙ scale_B",
    traps=(
        "There is no alpha. Without save_indices the indices depend on the order of the layers in "
        "the trainer's model, and the folder is refused.",
    ),
)
