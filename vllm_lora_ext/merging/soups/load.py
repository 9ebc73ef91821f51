"""Folders of a LoRA Soups run: ordinary adapters with a learned weight per module."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from vllm_lora_ext.adapters import AdapterFolder, check_adapter
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.names import module_of
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, fold
from vllm_lora_ext.merging.merge import Term
from vllm_lora_ext.merging.soups.softmax import softmax_weights

_SCALAR = re.compile(r"(?P<module>.+)\.lora_learnable_weights(\.\w+)?")


def load_soups(
    folders: Sequence[str | os.PathLike[str]],
) -> list[Term]:
    """The adapters of a LoRA Soups run, each with its learned weights, for method `soups`.

    A folder is an ordinary one with a scalar `<module>.lora_learnable_weights` per module; p =
    softmax over the adapters of one module, in this order.

    Raises:
        AdapterError: those of `load_factors`; `missing_tensor`, a module without a scalar.
    """
    read = [_read_soup(folder) for folder in folders]
    weights = softmax_weights([scalars for _, scalars in read])
    return [
        Term(factors, table, name=os.path.basename(os.path.normpath(folder)))
        for folder, (factors, _), table in zip(folders, read, weights, strict=True)
    ]


def _read_soup(
    path: str | os.PathLike[str],
) -> tuple[Factors, dict[str, float]]:
    folder = AdapterFolder(path, roots=())
    adapter = plain.read(folder)
    scalars = {}
    for name in folder.names:
        match = _SCALAR.fullmatch(name)
        if match:
            value = folder.take(name)
            if value.numel() != 1:
                raise AdapterError(
                    "bad_shape", f"'{name}' is no scalar", seen=list(value.shape), limit="[1]",
                    fix="save the adapter again",
                )  # fmt: skip
            scalars[module_of(match["module"])] = float(value)
    adapter = replace(adapter, source=os.fspath(path), digest=folder.finish())
    check_adapter(adapter)
    for module in adapter.modules:
        if module not in scalars:
            raise AdapterError(
                "missing_tensor", f"tensor '{module}.lora_learnable_weights' is missing",
                fix="use a folder of a LoRA Soups run, or give the weights yourself",
            )  # fmt: skip
    return fold(adapter, folder.config), scalars
