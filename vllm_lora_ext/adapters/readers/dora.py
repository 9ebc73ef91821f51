"""DoRA (PEFT): an ordinary LoRA with a magnitude for each output, read by the plain reader."""

from __future__ import annotations

import dataclasses

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.base import Reader


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "LORA" and (
        bool(folder.config.get("use_dora"))
        or any("lora_magnitude_vector" in name for name in folder.names)
    )


def read(folder: AdapterFolder) -> RoutedAdapter:
    return dataclasses.replace(plain.read(folder), system="dora")


READER = Reader(
    name="dora",
    title="DoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type LORA, use_dora true), a LoRA's tensors and "
    "<module>.lora_magnitude_vector",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353)",
    summary="No gate: an ordinary LoRA, after which each output of the layer is brought to a "
    "length that was learned.",
    formula="y = m / |W + alpha/r B A| (W x + alpha/r B A x) + bias, the norm of each row",
    needs=("base", "rank"),
    traps=(
        "It needs the base weights when it is loaded: on linear layers that are not quantised.",
        "It is no difference: it cannot be scaled, merged, nor stand beside another adapter on the "
        "same layer. As an ordinary LoRA, made offline, it is an approximation.",
    ),
    general=1,
)
