"""LoRAMoE and MoLA as MoE-PEFT saves them (github.com/TUDB-Labs/MoE-PEFT).

Its own file format: a prefix with the method's name, `moe_gate` and `experts.N` below each linear,
and a `peft_type` per method. Every layer has the same number of experts. LoRAMoE puts experts on
the MLP's linears only: an attention linear among its targets is an ordinary LoRA.
"""

from __future__ import annotations

import re
from typing import Any

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import Stack, expert_count, needed, stack_experts
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import (
    PeftLora,
    bad_value,
    read_peft_config,
    refuse_lost_dora,
    whole_number,
)
from vllm_lora_ext.errors import AdapterError

# Below `moe_gate` or `experts`, or directly below a linear; the prefix stands for `model`.
_PART = (
    r"{}\.(?P<module>layers\.\d+\.(self_attn|mlp)\.\w+)"
    r"\.(?P<part>moe_gate|(experts\.(0|[1-9]\d{{0,5}})\.)?lora_[AB])\.weight"
)
_STACK = Stack("experts.{}.lora_A", "experts.{}.lora_B", "moe_gate")
_KEYS = (
    "num_experts", "routing_strategy",
    "router_init_range", "router_aux_loss_coef", "router_loss", "lora_init",  # training only
)  # fmt: skip


def detect_loramoe(folder: AdapterFolder) -> bool:
    return _detect(folder, "LORAMOE", "loramoe")


def detect_mola(folder: AdapterFolder) -> bool:
    return _detect(folder, "MOLA", "mola")


def read_loramoe(folder: AdapterFolder) -> RoutedAdapter:
    return _read(folder, "loramoe", {}, plain_attention=True)


def read_mola(folder: AdapterFolder) -> RoutedAdapter:
    needed(folder.config, ("top_k", "num_experts"))
    experts = expert_count(folder.config, "num_experts")
    k = whole_number(folder.config["top_k"], f"top_k in {CONFIG}", 1, experts)
    gate = {"select": "top_k", "k": k, "weight": "renormalise"}
    return _read(folder, "mola", gate, also=("top_k",))


def _detect(folder: AdapterFolder, peft_type: str, prefix: str) -> bool:
    pattern = re.compile(_PART.format(prefix))
    return folder.config.get("peft_type") == peft_type and any(map(pattern.fullmatch, folder.names))


def _read(
    folder: AdapterFolder,
    prefix: str,
    gate: dict[str, Any],
    also: tuple[str, ...] = (),
    plain_attention: bool = False,
) -> RoutedAdapter:
    refuse_lost_dora(folder.config, CONFIG)
    config = read_peft_config(folder.config, also=(*_KEYS, *also), accepted=folder.accepted)
    if config.ranks or config.alphas:
        raise AdapterError(
            "unsupported_feature", f"MoE-PEFT knows no rank_pattern or alpha_pattern ({CONFIG})",
            limit="empty", fix="remove it",
        )  # fmt: skip
    needed(folder.config, ("routing_strategy",))
    strategy = folder.config["routing_strategy"]
    if strategy != prefix:
        raise bad_value(f"routing_strategy in {CONFIG}", strategy, f"'{prefix}'")
    experts = expert_count(folder.config, "num_experts")
    fields = {"blocks": [config.r] * experts, "score": "softmax", **gate}
    modules = {}
    for name, parts in group(folder.names, re.compile(_PART.format(prefix))).items():
        module = f"model.{name}"
        if plain_attention and ".self_attn." in module:
            modules[module] = _read_plain(folder, config, module, parts)
        else:
            modules[module] = _STACK.read(folder, module, parts, fields, config.scale(module))
    return RoutedAdapter(modules, system=f"{prefix}_moepeft", base_model=config.base_model)


def _read_plain(
    folder: AdapterFolder, config: PeftLora, module: str, parts: dict[str, str]
) -> RoutedModule:
    names = part(parts, "lora_A", module), part(parts, "lora_B", module)
    a_RK, b_NR = stack_experts(folder, [names[0]], [names[1]], config.r)
    return RoutedModule(a_RK=a_RK, b_NR=b_NR * config.scale(module))


_FILES = (
    "adapter_config.json (peft_type {}, routing_strategy, num_experts{}), "
    "adapter_model.safetensors with {}.layers.N.<linear>.moe_gate.weight, "
    ".experts.0.lora_A.weight, .experts.0.lora_B.weight, ..."
)
_NO_RSLORA = "use_rslora is written only when it is true: a config without it means alpha / r."

LORAMOE = Reader(
    name="loramoe_moepeft",
    title="LoRAMoE (MoE-PEFT)",
    url="https://github.com/TUDB-Labs/MoE-PEFT",
    files=_FILES.format("LORAMOE", "", "loramoe"),
    peft_types=("LORAMOE",),
    detect=detect_loramoe,
    read=read_loramoe,
    paper="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style "
    "Plugin (arXiv 2312.09979); this file format is MoE-PEFT's",
    summary="A softmax router per MLP linear weights all LoRA experts. Attention linears among the "
    "targets are ordinary LoRA.",
    formula="y = W x + alpha/r sum_e softmax(R x)_e B_e A_e x;  attention: y = W x + alpha/r B A x",
    traps=(
        "Only MLP linears get experts: attention targets are saved, and served, as plain LoRA.",
        "Other tensor names and another peft_type than the authors' own LoRAMoE files.",
        _NO_RSLORA,
    ),
)

MOLA = Reader(
    name="mola_moepeft",
    title="MoLA (MoE-PEFT)",
    url="https://github.com/TUDB-Labs/MoE-PEFT",
    files=_FILES.format("MOLA", ", top_k", "mola"),
    peft_types=("MOLA",),
    detect=detect_mola,
    read=read_mola,
    paper="Higher Layers Need More LoRA Experts (arXiv 2402.08562); this file format is MoE-PEFT's",
    summary="A softmax router per linear, attention and MLP alike, takes the top_k LoRA experts of "
    "a token and renormalises their weights.",
    formula="p = softmax(R x);  y = W x + alpha/r sum over the top_k e of "
    "p_e / (sum of the top_k p) B_e A_e x",
    traps=(
        "Every layer has the same number of experts, unlike in the authors' own MoLA.",
        "Other tensor names and another peft_type than the authors' own MoLA files.",
        _NO_RSLORA,
    ),
)
