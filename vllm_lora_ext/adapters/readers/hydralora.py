"""HydraLoRA (github.com/Clin0212/HydraLoRA): LoRAMoE's router, one A for all experts.

    y = W x + alpha/r · sum_e softmax(R x)_e B_e (A x)

Its config says `peft_type: LORA`; `lora_B0` beside an unnumbered `lora_A` tells it apart.
"""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import stack_experts
from vllm_lora_ext.adapters.readers.loramoe import NUMBERED_A, read_config
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import PeftLora
from vllm_lora_ext.routing import GateSpec

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(route|A|B(0|[1-9]\d{0,5})))\.weight")
_MARK = re.compile(r".+\.lora_(route|B\d+)\.weight")


def detect(folder: AdapterFolder) -> bool:
    return (
        folder.config.get("peft_type") == "LORA"
        and any(map(_MARK.fullmatch, folder.names))
        and not any(map(NUMBERED_A.fullmatch, folder.names))
    )


def read(folder: AdapterFolder) -> RoutedAdapter:
    config, experts = read_config(folder, "HydraLoRA")
    modules = {
        name: _read_module(folder, config, experts, name, parts)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system="hydralora", base_model=config.base_model)


def _read_module(
    folder: AdapterFolder, config: PeftLora, experts: int, module: str, parts: dict[str, str]
) -> RoutedModule:
    b_names = [part(parts, f"lora_B{e}", module) for e in range(experts)]
    a_RK, b_NR = stack_experts(folder, [part(parts, "lora_A", module)], b_names, config.r)
    return RoutedModule(
        a_RK=a_RK,
        b_NR=b_NR * (config.alpha / config.r),
        gate=GateSpec(source="router", blocks=(config.r,) * experts, score="softmax"),
        router_GK=folder.take(part(parts, "lora_route", module)),
    )


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
