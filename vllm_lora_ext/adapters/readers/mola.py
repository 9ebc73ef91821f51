"""MoLA (github.com/GCYZSL/MoLA): a top-k router per linear, more experts in higher layers.

    p = softmax(R x)    y = W x + sum_{e in top-k(p)} p_e / sum p · alpha/r[layer] · B_e A_e x

`r` is a list, one rank per layer. How many experts a layer has and how many of them a token uses
are command-line arguments of the authors; the first shows in the tensors, the second nowhere.
MoE-PEFT's files of the same method are another format (`moe_peft.py`).
"""

from __future__ import annotations

import re
from typing import Any

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import Stack, early_peft_config, needed
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import MAX_RANK, bad_value, whole_number
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]_(0|[1-9]\d{0,5})|router\.router)\.weight")
_MARK = re.compile(r".+\.(lora_[AB]_\d+|router\.router)\.weight")
_STACK = Stack("lora_A_{}", "lora_B_{}", "router.router")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_MAX_LAYERS = 4096


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "LORA" and any(map(_MARK.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    needed(folder.config, ("r",))
    ranks = _list(folder.config["r"], f"r in {CONFIG}", MAX_RANK)
    # A rank of 1 stands in for the list, which PEFT does not have.
    config = early_peft_config({**folder.config, "r": 1}, "MoLA", accepted=folder.accepted)
    k = _by_layer(folder, "top_k", "how many experts a token uses, by layer", len(ranks))
    experts = None
    if folder.has_setting("number_experts"):
        experts = _by_layer(folder, "number_experts", "how many experts a layer has", len(ranks))
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        layer = _layer_of(name, len(ranks))
        wanted = experts[layer] if experts else None
        modules[name] = _read_module(
            folder, name, parts, ranks[layer], config.alpha / ranks[layer], k[layer], wanted
        )
    return RoutedAdapter(modules, system="mola", base_model=config.base_model)


def _list(values: Any, field: str, high: int) -> list[int]:
    if not isinstance(values, list) or not 1 <= len(values) <= _MAX_LAYERS:
        raise bad_value(field, values, "a list with one number per layer")
    return [whole_number(v, f"{field}, layer {i}", 1, high) for i, v in enumerate(values)]


def _by_layer(folder: AdapterFolder, key: str, meaning: str, layers: int) -> list[int]:
    """A setting with a number per layer, or one number for all."""
    value, field = folder.setting(key, meaning), f"{key} in routing.json"
    if not isinstance(value, list):
        return [whole_number(value, field, 1, MAX_EXPERTS)] * layers
    found = _list(value, field, MAX_EXPERTS)
    if len(found) != layers:
        raise AdapterError(
            "setting_mismatch", f"{field} has another number of layers than r in {CONFIG}",
            seen=len(found), limit=layers, fix="give one number per layer",
        )  # fmt: skip
    return found


def _layer_of(module: str, layers: int) -> int:
    match = _LAYER.search(module)
    layer = int(match[1]) if match else layers
    if layer >= layers:
        raise AdapterError(
            "setting_mismatch", f"r in {CONFIG} has no entry for the layer of {module}",
            seen=f"{layers} layers", fix="give r one number per layer",
        )  # fmt: skip
    return layer


def _read_module(
    folder: AdapterFolder, module: str, parts: dict[str, str], rank: int, scale: float, k: int,
    wanted: int | None,
) -> RoutedModule:  # fmt: skip
    router = part(parts, "router.router", module)
    experts = folder.shape(router)[0] if folder.shape(router) else 0
    if wanted not in (None, experts) or experts < 1:
        raise AdapterError(
            "setting_mismatch", f"number_experts in routing.json is not the router's at {module}",
            seen=list(folder.shape(router)), limit=f"[{wanted or 'experts'}, in]",
            fix="mend number_experts",
        )  # fmt: skip
    gate = {
        "blocks": [rank] * experts, "score": "softmax", "select": "top_k", "k": k,
        "weight": "renormalise",
    }  # fmt: skip
    return _STACK.read(folder, module, parts, gate, scale, "(top_k in routing.json)")


READER = Reader(
    name="mola",
    title="MoLA",
    url="https://github.com/GCYZSL/MoLA",
    files="adapter_config.json (peft_type LORA, r a list), adapter_model.safetensors with "
    "<module>.router.router.weight, .lora_A_0.weight, .lora_B_0.weight, ...; routing.json with "
    "top_k, number_experts",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="Higher Layers Need More LoRA Experts (arXiv 2402.08562)",
    summary="A softmax router per linear takes the top_k LoRA experts of a token and renormalises "
    "their weights; layers have different numbers of experts, and may have different ranks.",
    formula="p = softmax(R x);  y = W x + alpha/r[layer] sum over the top_k e of "
    "p_e / (sum of the top_k p) B_e A_e x",
    settings={
        "top_k": "experts that a token uses: one number, or a list with one per layer (2 by "
        "default in the authors' scripts)",
        "number_experts": "experts of each layer: one number, or a list with one per layer; "
        "optional, checked against the tensors",
    },
    traps=(
        "r in the config is a list over layers, and the scale is alpha / r of the layer.",
        "top_k and number_experts are in no file of the authors' code.",
        "Every linear has its own router: q_proj and k_proj of a layer choose different experts.",
    ),
)
