"""LoRA-Mixer: a top-k router over ordinary adapters, in a layout of our own.

    y = W x + sum_{e in topk(p)} p_e / (sum of the chosen p) · s_e B_e A_e x,   p = softmax(R x / T)

The authors have published no code and no file format; this is the paper's definition over files
that everybody has: PEFT adapters in subfolders, and one router matrix per adapted linear.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder, missing_tensor
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.bundle import (
    ExpertFolder,
    expert_names,
    read_expert,
    refuse_others,
    same_base,
    same_layers,
)
from vllm_lora_ext.adapters.readers.names import group
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.errors import AdapterError

SYSTEM = "lora-mixer"
_PART = re.compile(r"(?P<module>(?!.*\.router\.router\.).+)\.(?P<part>router)\.weight")
_SETTINGS = {
    "system": f"{SYSTEM}: that these routers mean what is written here",
    "expert_order": "the experts' folders, in the order of the routers' rows",
    "top_k": "how many experts a token uses",
    "renormalise": "whether the chosen weights are divided by their sum (default true)",
    "temperature": "divides the router's logits (default 1)",
}


def detect(folder: AdapterFolder) -> bool:
    return not folder.has_config and any(map(_PART.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    system = folder.setting("system", _SETTINGS["system"])
    if system != SYSTEM:
        raise bad_value(f"system in {SIDECAR}", system, SYSTEM)
    order = folder.setting("expert_order", _SETTINGS["expert_order"])
    names = expert_names(folder, order, "expert_order")
    refuse_others(folder, names, "expert_order")
    gate = _gate_fields(folder)
    experts = [read_expert(folder, name) for name in names]
    routers = {name: parts["router"] for name, parts in group(folder.names, _PART).items()}
    layers = same_layers(experts)
    for name in layers:
        if name not in routers:
            raise missing_tensor(f"{name}.router.weight", ": the experts adapt this layer")
    unused = sorted(set(routers) - set(layers))
    if unused:
        raise AdapterError(
            "unexpected_tensor", "there is a router of a layer that no expert adapts",
            seen=routers[unused[0]], fix="remove it, or add the experts' tensors",
        )  # fmt: skip
    modules = {name: _read_module(folder, name, experts, routers[name], gate) for name in layers}
    return RoutedAdapter(modules, system="lora_mixer", base_model=same_base(experts))


def _gate_fields(folder: AdapterFolder) -> dict[str, Any]:
    renormalise, temperature = True, 1.0
    if folder.has_setting("renormalise"):
        renormalise = folder.setting("renormalise", _SETTINGS["renormalise"])
        if not isinstance(renormalise, bool):
            raise bad_value("renormalise", renormalise, "true or false")
    if folder.has_setting("temperature"):
        temperature = folder.setting("temperature", _SETTINGS["temperature"])
    return {
        "source": "router", "score": "softmax", "score_temperature": temperature,
        "select": "top_k", "k": folder.setting("top_k", _SETTINGS["top_k"]),
        "weight": "renormalise" if renormalise else "score",
    }  # fmt: skip


def _read_module(
    folder: AdapterFolder, name: str, experts: list[ExpertFolder], router: str, gate: dict[str, Any]
) -> RoutedModule:
    shape = folder.shape(router)
    if len(shape) != 2 or shape[0] != len(experts):
        raise AdapterError(
            "setting_mismatch",
            f"expert_order names {len(experts)} experts, not those of '{router}'",
            seen=list(shape), limit=f"[{len(experts)}, in]",
            fix="name every expert once, in the order of the router's rows",
        )  # fmt: skip
    blocks = [expert.modules[name].rank for expert in experts]
    return RoutedModule(
        a_RK=torch.cat([expert.modules[name].a_RK for expert in experts]),
        b_NR=torch.cat([expert.scaled_b(name) for expert in experts], dim=1),
        gate=make_gate({**gate, "blocks": blocks}, f"{name} (top_k, temperature in {SIDECAR})"),
        router_GK=folder.take(router),
    )


READER = Reader(
    name="lora_mixer",
    title="LoRA-Mixer",
    url="https://github.com/hustcselwb/LoRA-Mixer",
    files="adapter_model.safetensors or model.safetensors with <module>.router.weight [experts, "
    "in], ordinary LoRA adapters (PEFT) in subfolders, routing.json with system lora-mixer, "
    "expert_order and top_k; no adapter_config.json",
    peft_types=(),
    detect=detect,
    read=read,
    paper="LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing,"
    " https://arxiv.org/abs/2507.00029",
    summary="Every adapted projection has a router: softmax over the experts, the k largest,"
    " divided by their sum. The experts are ordinary adapters, which may differ in rank and scale.",
    formula="y = W x + sum_{e in topk(p)} p_e / (sum of the chosen p) · s_e B_e A_e x,"
    " p = softmax(R x / T)",
    settings=_SETTINGS,
    traps=(
        "There is no published code and no published checkpoint: the layout is ours, made from"
        " the paper's definition, and nothing of it was compared with the authors' numbers.",
        "The paper routes attention projections (and the projections of state space models); here"
        " every linear that the experts adapt may have a router.",
        "Whether the weights are renormalised after top-k is not certain from the paper: the"
        " setting renormalise decides.",
    ),
)
