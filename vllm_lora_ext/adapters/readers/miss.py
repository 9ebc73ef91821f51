"""MiSS (arXiv 2409.15371), as PEFT saves it: the input is folded to r values, then one matrix.

    y = W x + M^T fold(x),   fold(x)_p = sum of x_j over all j with j mod r = p

so A is a 0/1 matrix and B the transposed block. `bat` multiplies with the base weight instead.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.tuners import (
    SIZES,
    bad_shape,
    layer_sizes,
    read_tuner_config,
    whole,
)
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>miss_block)")
_KEYS = ("mini_r", "miss_dropout", "r")


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "MISS"


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder.config, _KEYS)
    rank, flavour = whole(folder.config, "r"), folder.config.get("init_weights")
    if flavour == "bat":
        raise AdapterError(
            "unsupported_feature", "init_weights 'bat' in adapter_config.json multiplies with the"
            " base weights, so its delta is no low-rank matrix of its own",
            fix="convert it offline with the base model and a rank",
        )  # fmt: skip
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        tensor = part(parts, "miss_block", name)
        width, out = layer_sizes(folder, name)
        columns = whole(folder.config, "mini_r") if flavour == "mini" else out
        if folder.shape(tensor) != (rank, columns) or out % columns:
            raise bad_shape(tensor, folder.shape(tensor), f"[{rank}, {columns}], out {out}")
        block_RN = folder.take(tensor).repeat(1, out // columns)
        modules[name] = RoutedModule(a_RK=fold_matrix(rank, width), b_NR=block_RN.T.contiguous())
    return RoutedAdapter(modules, system="miss", base_model=base_model)


def fold_matrix(rank: int, width: int) -> torch.Tensor:
    """[rank, width]: one where column mod rank is the row."""
    return (torch.arange(width) % rank == torch.arange(rank)[:, None]).float()


READER = Reader(
    name="miss",
    title="MiSS (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type MISS), adapter_model.safetensors with "
    "<module>.miss_block",
    peft_types=("MISS",),
    detect=detect,
    read=read,
    paper="MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing, "
    "https://arxiv.org/abs/2409.15371",
    summary="No gate: a LoRA whose A sums every r-th input and whose B is trained.",
    formula="y = W x + M^T fold_r(x)",
    settings={"sizes": SIZES},
    traps=(
        "No file says how wide a layer is: give the base model to `convert`, or `sizes`.",
        "init_weights is no training detail here: 'bat' and 'mini' are other formulas.",
    ),
)
