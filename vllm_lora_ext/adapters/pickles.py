"""Tensors out of a pickle, which could run code: only where somebody asked for it.

`torch.load(weights_only=True)` takes tensors and plain containers and refuses all else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_lora_ext.adapters.files import too_large
from vllm_lora_ext.errors import AdapterError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_pickle(path: Path, name: str, limit: int, most: int) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote, each in memory of its own.

    Of a checkpoint whose tensors stand under `model`, beside settings and other things, those.

    Args:
        name: the file, for messages.
        limit: bytes of the file, of what it unpacks to, and of all tensors together.
        most: number of tensors.
    Raises:
        AdapterError: `pickle_refused` (more than tensors, or broken), `too_large`.
    """
    _check_size(name, path.stat().st_size, limit)
    try:
        with zipfile.ZipFile(path) as archive:
            # Records may be compressed: what counts is what they grow to.
            _check_size(name, sum(entry.file_size for entry in archive.infolist()), limit)
    except zipfile.BadZipFile:
        raise _refused(name, "it is no file that torch.save of release 1.6 or later writes") from (
            None
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # weights_only raises many kinds, and each of them means no
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refused(name, first) from error
    return _tensors(name, _model(loaded), limit, most)


def _model(loaded: object) -> object:
    """Of a trainer's checkpoint (fairseq: cfg, model, optimizer, ...) the model."""
    inside = isinstance(loaded, Mapping) and loaded.get("model")
    return inside if isinstance(inside, Mapping) else loaded


def _tensors(name: str, loaded: object, limit: int, most: int) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, Mapping) or not loaded:
        raise _refused(name, f"it holds a {type(loaded).__name__}, not a dict of tensors")
    _check_size(name, len(loaded), most)
    total = 0
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise _refused(name, f"{key!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise _refused(name, f"'{key}' is a sparse, quantised or empty (meta) tensor")
        # A tensor may claim any size over a small storage: ask before it is written out.
        total += value.numel() * value.element_size()
        _check_size(name, total, limit)
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in loaded.items()
    }


def _check_size(name: str, seen: int, limit: int) -> None:
    if seen > limit:
        raise too_large(name, seen, limit)


def _refused(name: str, why: str) -> AdapterError:
    return AdapterError(
        "pickle_refused", f"{name} is not read, even where pickles are allowed: {why[:300]}",
        limit="a dict of tensors, which torch.load(weights_only=True) takes",
        fix="save the tensors alone, best as safetensors",
    )  # fmt: skip
