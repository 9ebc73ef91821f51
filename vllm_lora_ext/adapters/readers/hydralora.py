"""HydraLoRA (github.com/Clin0212/HydraLoRA): LoRAMoE's router, one A for all experts.

    y = W x + alpha/r · sum_e softmax(R x)_e B_e (A x)

Its config says `peft_type: LORA`; `lora_B0` beside an unnumbered `lora_A` tells it apart.
"""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import Stack
from vllm_lora_ext.adapters.readers.loramoe import read_dense

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(route|A|B(0|[1-9]\d{0,5})))\.weight")
_STACK = Stack("lora_A", "lora_B{}", "lora_route")
_ONE_A = re.compile(r".+\.lora_A\.weight")
_MARK = re.compile(r".+\.lora_(route|B\d+)\.weight")


def detect(folder: AdapterFolder) -> bool:
    if folder.config.get("peft_type") != "LORA":
        return False
    marked = any(map(_MARK.fullmatch, folder.names))
    if any(map(_ONE_A.fullmatch, folder.names)):
        return marked or "lora_nums" in folder.config
    # Without any A it is somebody's all the same, and the reader says which tensor is missing.
    return marked and not any(".lora_A" in name for name in folder.names)


def read(folder: AdapterFolder) -> RoutedAdapter:
    return read_dense(folder, "hydralora", "HydraLoRA", _PART, _STACK)


READER = Reader(
    name="hydralora",
    title="HydraLoRA",
    url="https://github.com/Clin0212/HydraLoRA",
    files="adapter_config.json (peft_type LORA, lora_nums), adapter_model.safetensors with "
    "<module>.lora_route.weight, .lora_A.weight, .lora_B0.weight, .lora_B1.weight, ...",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning (arXiv 2404.19245)",
    summary="One A for the whole layer and one B per expert; a softmax router per linear weights "
    "all experts, none is left out.",
    formula="y = W x + alpha/r sum_e softmax(R x)_e B_e (A x)",
    traps=(
        "A is shared: it is stored, and computed, once.",
        "The gate is dense. Every expert answers every token.",
        "The config says peft_type LORA; a plain loader finds lora_A but no lora_B.",
    ),
)
