"""MiSS (arXiv 2409.15371), as PEFT saves it: the input is folded to r values, then one matrix.

    y = W x + M^T fold(x),   fold(x)_p = sum of x_j over all j with j mod r = p

so A is a 0/1 matrix and B the transposed block. `bat` multiplies with the base weight instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.tuners import (
    CONFIG,
    SIZES,
    bad_shape,
    layer_sizes,
    read_tuner_config,
    whole,
)
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>miss_block)")
_KEYS = ("mini_r", "miss_dropout", "r")


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    rank, flavour = whole(folder.config, "r"), folder.config.get("init_weights")
    modules, layers = {}, group(folder.names, _PART)
    _miss_no_layer(folder, layers)
    for name, parts in layers.items():
        tensor = part(parts, "miss_block", name)
        width, out = layer_sizes(folder, name)
        columns = whole(folder.config, "mini_r") if flavour == "mini" else out
        if folder.shape(tensor) != (rank, columns) or out % columns:
            raise bad_shape(tensor, folder.shape(tensor), f"[{rank}, {columns}], out {out}")
        folder.reserve(rank * (width + out))
        block_RN = folder.take(tensor).repeat(1, out // columns)
        modules[name] = RoutedModule(a_RK=fold_matrix(rank, width), b_NR=block_RN.T.contiguous())
    return RoutedAdapter(modules, system="miss", base_model=base_model)


def _miss_no_layer(folder: AdapterFolder, layers: Collection[str]) -> None:
    """A layer is one tensor, so that a lost one leaves nothing behind but its size.

    Raises:
        AdapterError: `missing_tensor`, `unexpected_tensor`.
    """
    config, sizes = folder.config, folder.setting("sizes", SIZES)
    targets, only = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(targets, list) or not isinstance(sizes, dict):
        return
    for name in layers:
        if not _named(name, targets):
            raise AdapterError(
                "unexpected_tensor", f"there are tensors of a layer that target_modules in {CONFIG}"
                " does not name", seen=name, fix="add it to target_modules",
            )  # fmt: skip
    spared = config.get("exclude_modules")
    if only is not None or spared:
        return
    for name in sizes:
        if "." in name and name not in layers and _named(name, targets):
            raise AdapterError(
                "missing_tensor", f"target_modules in {CONFIG} names {name}, sizes has it, and"
                " there is no tensor for it", fix="save the adapter again",
            )  # fmt: skip


def _named(module: str, targets: list[Any]) -> bool:
    """PEFT's rule: a name, or its tail after a dot."""
    return any(module == t or (isinstance(t, str) and module.endswith(f".{t}")) for t in targets)


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
    detect=of_type("MISS"),
    read=read,
    paper="MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing, "
    "https://arxiv.org/abs/2409.15371",
    summary="No gate: a LoRA whose A sums every r-th input and whose B is trained.",
    formula="y = W x + M^T fold_r(x)",
    settings={"sizes": SIZES},
    traps=(
        "No file says how wide a layer is: `sizes` must.",
        "A layer is one tensor: a lost one is found only when `sizes` names the layers in full.",
        "init_weights is no training detail here: 'bat' and 'mini' are other formulas.",
    ),
    general=1,  # `bat` is a format of its own
)
