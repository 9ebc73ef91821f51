"""Factors kept as coefficients over random or shared vectors: NOLA and Uni-LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import read_peft_config
from vllm_lora_ext.adapters.readers.tuners import (
    bad_shape,
    check_shape,
    read_tuner_config,
    take_shaped,
    whole,
)
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.variants.source import Source

_NOLA = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.(weight|seed|coefficients))")
_UNI = re.compile(r"(?P<module>.+)\.(?P<part>unilora_(indices|scales)_[AB])")
_CHUNK = 1 << 24  # values of a basis in memory at once


def nola(source: Source) -> Factors:
    """NOLA (arXiv 2310.02556): A = A_0 + 1/sqrt(k) sum_b c_b U_b, U drawn from a stored seed.

    U is uniform(-1, 1) of shape [k, rows, columns], from torch's CPU generator. Setting
    `basis_check`: `<module>.lora_A` → {"first_four": [...], "last": x}, values of the trainer's
    basis; `device`: where it was drawn, only "cpu" can be drawn again.
    """
    folder = source.folder
    config = read_peft_config(folder.config, also=("use_nola", "nola_num_basis"))
    count = whole(folder.config, "nola_num_basis")
    if source.setting("device", "cpu") != "cpu":
        raise AdapterError(
            "unsupported_feature", "NOLA's basis was drawn on a GPU, whose stream differs",
            seen=source.setting("device", "cpu"), limit="cpu", fix="expand it where it was trained",
        )  # fmt: skip
    checks = source.setting("basis_check", {})
    modules, scales = {}, {}
    for name, parts in group(folder.names, _NOLA).items():
        sides = []
        for side in "AB":
            frozen = take_shaped(folder, part(parts, f"lora_{side}.weight", name), None, None)
            seed_name = part(parts, f"lora_{side}.seed", name)
            check_shape(seed_name, folder.shape(seed_name), 1)
            seed = int(folder.take_ints(seed_name))
            value_C = take_shaped(folder, part(parts, f"lora_{side}.coefficients", name), count)
            check = checks.get(f"{name}.lora_{side}")
            sides.append(frozen + expand(seed, value_C, tuple(frozen.shape), check))
        check_shape(f"{name}.lora_B", tuple(sides[1].shape), None, sides[0].shape[0])
        scales[name] = config.scale(name)
        modules[name] = Pair(sides[0], sides[1] * scales[name])
    if not checks:
        source.notes.append(
            "NOLA's basis was drawn again with torch's CPU generator and could not be checked: "
            "another device or torch version would have trained with another basis"
        )
    return Factors(modules, config.base_model, scales=scales)


def expand(
    seed: int, value_C: torch.Tensor, shape: tuple[int, ...], check: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """`1/sqrt(k) sum_b value_b U_b` of the given shape, the basis drawn a chunk at a time.

    Chunks keep the stream of one draw: torch's CPU generator fills uniform values in order.

    Raises:
        AdapterError: `setting_mismatch`, the stream is not the one that `check` was taken from.
    """
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    step = max(1, _CHUNK // size)
    total = torch.zeros(size, dtype=torch.float64)
    first: torch.Tensor | None = None
    last = 0.0
    for start in range(0, len(value_C), step):
        part_C = value_C[start : start + step]
        basis = torch.empty(len(part_C) * size).uniform_(-1, 1, generator=generator)
        first, last = basis[:4].clone() if first is None else first, float(basis[-1])
        total += part_C.double() @ basis.view(len(part_C), size).double()
    if check is not None and first is not None:
        wanted = torch.tensor([*check["first_four"], check["last"]])
        seen = torch.cat([first, torch.tensor([last])])
        if not torch.allclose(seen, wanted, atol=1e-6):
            raise AdapterError(
                "setting_mismatch", "this torch draws another basis than the trainer's did",
                seen=seen.tolist(), limit=wanted.tolist(),
                fix="expand it on the machine that trained it",
            )  # fmt: skip
    return (total / math.sqrt(len(value_C))).float().view(shape)


def unilora(source: Source) -> Factors:
    """Uni-LoRA (arXiv 2506.00799) with stored indices: entries of one vector, scaled. Exact."""
    folder = source.folder
    keys = (
        "init_theta_d_bound", "proj_seed", "r", "save_indices", "theta_d_length",
        "unilora_dropout",
    )  # fmt: skip
    base_model = read_tuner_config(folder.config, keys)
    rank = whole(folder.config, "r")
    theta_D = take_shaped(folder, "base_model.unilora_theta_d", None)
    layers = group(folder.names, _UNI)
    if not layers:
        raise AdapterError(
            "unsupported_feature", "Uni-LoRA without stored indices: they depend on the order of"
            " the layers in the trainer's model", seen="save_indices false",
            limit="save_indices true", fix="save it with save_indices",
        )  # fmt: skip
    modules = {}
    for name, parts in layers.items():
        sides = []
        for side in "AB":
            index_name = part(parts, f"unilora_indices_{side}", name)
            shape = (rank, None) if side == "A" else (None, rank)
            check_shape(index_name, folder.shape(index_name), *shape)
            index = folder.take_ints(index_name)
            if not 0 <= int(index.min()) <= int(index.max()) < len(theta_D):
                raise bad_shape(f"{name}.unilora_indices_{side}", tuple(index.shape), "in range")
            scale_name = part(parts, f"unilora_scales_{side}", name)
            scale = take_shaped(folder, scale_name, *index.shape)
            sides.append(theta_D[index] * scale)
        modules[name] = Pair(*sides)
    return Factors(modules, base_model)
