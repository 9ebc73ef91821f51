"""LoRAMoE (github.com/Ablustrund/LoRAMoE): a dense softmax over all experts of a linear.

    y = W x + alpha/r · sum_e softmax(R x)_e B_e A_e x

Its config says `peft_type: LORA`; numbered tensors (`lora_A0`) and `lora_nums` tell it apart.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, read_peft_config, whole_number
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(route|[AB](0|[1-9]\d*)))\.weight")
_MARK = re.compile(r".+\.lora_A\d+\.weight")
# `blc_*` weigh a training loss; the other two come from old PEFT.
_KEYS = ("lora_nums", "blc_alpha", "blc_weight", "enable_lora", "merge_weights")
_MAX_EXPERTS = 4096


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "LORA" and any(map(_MARK.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = read_peft_config(folder.config, also=_KEYS)
    if "lora_nums" not in folder.config:
        raise AdapterError(
            "missing_key", "adapter_config.json has no 'lora_nums', the number of experts",
            fix="add lora_nums to adapter_config.json",
        )  # fmt: skip
    experts = whole_number(
        folder.config["lora_nums"], "lora_nums in adapter_config.json", 1, _MAX_EXPERTS
    )
    for feature in ("enable_lora", "merge_weights"):
        if folder.config.get(feature):
            raise AdapterError(
                "unsupported_feature", f"adapter_config.json sets '{feature}', which is not served",
                seen=folder.config[feature], limit="null or false", fix="save it without",
            )  # fmt: skip
    if config.rslora or config.ranks or config.alphas:
        raise AdapterError(
            "unsupported_feature",
            "LoRAMoE knows no use_rslora, rank_pattern or alpha_pattern (adapter_config.json)",
            fix="remove them",
        )  # fmt: skip
    modules = {
        name: _read_module(folder, config, experts, name, parts)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system="loramoe", base_model=config.base_model)


def _read_module(
    folder: AdapterFolder, config: PeftLora, experts: int, module: str, parts: dict[str, str]
) -> RoutedModule:
    a_names = [part(parts, f"lora_A{e}", module) for e in range(experts)]
    b_names = [part(parts, f"lora_B{e}", module) for e in range(experts)]
    width = folder.shape(a_names[0])[-1:]
    out = folder.shape(b_names[0])[:1]
    for name in a_names:
        if folder.shape(name) != (config.r, *width):
            raise rank_mismatch(name, folder.shape(name), f"[{config.r}, {_show(width)}]")
    for name in b_names:
        if folder.shape(name) != (*out, config.r):
            raise rank_mismatch(name, folder.shape(name), f"[{_show(out)}, {config.r}]")
    b_NR = torch.cat([folder.take(name) for name in b_names], dim=1)
    return RoutedModule(
        a_RK=torch.cat([folder.take(name) for name in a_names]),
        b_NR=b_NR * (config.alpha / config.r),
        gate=GateSpec(source="router", blocks=(config.r,) * experts, score="softmax"),
        router_GK=folder.take(part(parts, "lora_route", module)),
    )


def _show(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if sizes else "?"


READER = Reader(
    name="loramoe",
    title="LoRAMoE",
    url="https://github.com/Ablustrund/LoRAMoE",
    files="adapter_config.json (peft_type LORA, lora_nums), adapter_model.safetensors with "
    "<module>.lora_route.weight, <module>.lora_A0.weight, <module>.lora_B0.weight, ...",
    peft_types=("LORA",),
    detect=detect,
    read=read,
)
