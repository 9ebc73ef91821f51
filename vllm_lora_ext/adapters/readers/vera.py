"""VeRA (arXiv 2310.11454), as PEFT saves it: two shared random matrices, two vectors per layer.

y = W x + λ_b ⊙ (B (λ_d ⊙ (A x))),   A and B cut to the layer's size
"""

from __future__ import annotations

import math
import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import flag
from vllm_lora_ext.adapters.readers.tuners import (
    CONFIG,
    SIZES,
    bad_shape,
    layer_sizes,
    read_tuner_config,
    require,
    take_shaped,
    whole,
)

_PART = re.compile(r"(?P<module>.+)\.(?P<part>vera_lambda_[bd])")
_SHARED = ("base_model.vera_A", "base_model.vera_B")
_KEYS = ("d_initial", "projection_prng_key", "r", "save_projection", "vera_dropout")


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    rank = whole(folder.config, "r")
    layers = group(folder.names, _PART)
    sizes = {name: layer_sizes(folder, name) for name in layers}
    if flag(require(folder.config, "save_projection"), f"save_projection in {CONFIG}"):
        a_RK = take_shaped(folder, _SHARED[0], rank, None)
        b_NR = take_shaped(folder, _SHARED[1], None, rank)
    else:
        widest = max((size[0] for size in sizes.values()), default=1)
        tallest = max((size[1] for size in sizes.values()), default=1)
        seed = whole(folder.config, "projection_prng_key", 0, (1 << 63) - 1)
        folder.reserve(rank * (widest + tallest))
        a_RK, b_NR = shared_projections(seed, rank, widest, tallest)
    modules = {}
    for name, parts in layers.items():
        width, out = sizes[name]
        d_R = take_shaped(folder, part(parts, "vera_lambda_d", name), rank)
        b_N = take_shaped(folder, part(parts, "vera_lambda_b", name), out)
        if a_RK.shape[1] < width:
            raise bad_shape(_SHARED[0], tuple(a_RK.shape), f"[{rank}, {width} or more]")
        if b_NR.shape[0] < out:
            raise bad_shape(_SHARED[1], tuple(b_NR.shape), f"[{out} or more, {rank}]")
        folder.reserve(rank * (width + out))
        modules[name] = RoutedModule(
            a_RK=a_RK[:, :width] * d_R[:, None], b_NR=b_NR[:out] * b_N[:, None]
        )
    return RoutedAdapter(modules, system="vera", base_model=base_model)


def shared_projections(
    seed: int, rank: int, widest: int, tallest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, widest] and B [tallest, rank] as PEFT draws them when it does not store them.

    Kaiming-uniform from torch's CPU generator: right for the torch versions whose stream is that
    of the trainer's.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in ((rank, widest), (tallest, rank)):
        bound = math.sqrt(6.0 / shape[1])
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


READER = Reader(
    name="vera",
    title="VeRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type VERA), adapter_model.safetensors with "
    "<module>.vera_lambda_b, <module>.vera_lambda_d and, unless save_projection was off, "
    "base_model.vera_A and base_model.vera_B",
    peft_types=("VERA",),
    detect=of_type("VERA"),
    read=read,
    paper="VeRA: Vector-based Random Matrix Adaptation, https://arxiv.org/abs/2310.11454",
    summary="No gate: one frozen random A and B for all layers, scaled by two vectors per layer.",
    formula="y = W x + λ_b ⊙ (B (λ_d ⊙ (A x)))",
    settings={"sizes": SIZES},
    traps=(
        "No file says how wide a layer is: `sizes` must.",
        "save_projection says where A and B come from: true without them in the file is an error, "
        "and so is false with them.",
        "Without stored projections they are drawn again from projection_prng_key, which another "
        "version of torch may answer with other numbers.",
    ),
)
