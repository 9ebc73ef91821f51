"""MixLoRA (github.com/TUDB-Labs/MixLoRA, and the same method in TUDB-Labs/MoE-PEFT).

    y = sum_e v_e · expert_e(x),   v = top-k of softmax(W_g x), renormalised
    expert_e: the model's own MLP with a LoRA of its own on gate, up and down

One router per MLP block; the attention's linears carry one ordinary LoRA each. Li et al. 2024,
arXiv 2404.15159. Both packages write the same names; an older one (mLoRA) had others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import (
    MAX_ALPHA,
    MAX_RANK,
    bad_value,
    base_model_of,
    check_keys,
    flag,
    refuse_lost_dora,
    whole_number,
)
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

_PREFIX = "mixlora.layers."
_LEGACY = "mixtral"
_PART = re.compile(r"mixlora\.layers\.(?P<module>\d+\.\w+\.\w+)\.(?P<part>lora_[AB])\.weight")
_EXPERT = re.compile(
    r"mixlora\.layers\.(?P<module>\d+\.mlp\.\w+)"
    r"\.(?P<part>experts\.(0|[1-9]\d*)\.lora_[AB])\.weight"
)
_ROUTER = re.compile(r"mixlora\.layers\.(?P<module>\d+\.mlp)\.(?P<part>moe_gate)\.weight")
_OLD = re.compile(
    r"mixlora\.layers\.(?P<layer>\d+)\.(?:(?P<gate>gate)"
    r"|experts\.(?P<expert>\d+)\.(?P<linear>w[123])(?:_proj)?\.(?P<letter>lora_[AB]))\.weight"
)
_OLD_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_NEEDED = ("r", "lora_alpha", "target_modules", "routing_strategy", "num_experts")
_KEYS = frozenset({
    *_NEEDED, "peft_type", "task_type", "base_model_name_or_path", "bias", "lora_dropout",
    "lora_init", "use_dora", "use_rslora", "expert_lora", "act_fn", "top_k", "top_p", "temperature",
    "router_aux_loss_coef", "router_loss", "router_init_range", "jitter_noise", "inference_mode",
})  # fmt: skip


@dataclass(frozen=True)
class _Config:
    """What the config says: scale and rank of the attention's LoRA, and of the experts'."""

    rank: int
    scale: float
    expert_rank: int
    expert_scale: float
    experts: int
    targets: frozenset[str]
    act: str | None
    base_model: str

    def gate(self, config: Mapping[str, Any]) -> GateSpec:
        fields: dict[str, Any] = {"source": "router", "score": "softmax"}
        fields["blocks"] = (self.expert_rank,) * self.experts
        if config["routing_strategy"] == "mixlora-dynamic":
            return make_gate(fields | _dynamic(config), CONFIG)
        k = whole_number(_need(config, "top_k"), f"top_k in {CONFIG}", 1, MAX_EXPERTS)
        return make_gate(fields | {"select": "top_k", "k": k, "weight": "renormalise"}, CONFIG)


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "MIXLORA" and any(
        name.startswith(_PREFIX) for name in folder.names
    )


def read(folder: AdapterFolder) -> RoutedAdapter:
    _check_keys(folder.config, folder.accepted)
    names = _modern_names(folder)
    routers = group(names, _ROUTER)
    experts = group(names, _EXPERT)
    config = _read_config(folder, names, experts)
    gate = config.gate(folder.config)
    blocks = {}
    for block, parts in routers.items():
        linears = {name: p for name, p in experts.items() if name.rpartition(".")[0] == block}
        blocks[f"model.layers.{block}"] = MixBlock(
            gate,
            folder.take(names[part(parts, "moe_gate", block)]),
            {
                name.rpartition(".")[2]: _experts(folder, config, name, p, names)
                for name, p in linears.items()
            },
            config.act,
        )
    for name in experts:
        if name.rpartition(".")[0] not in routers:
            part({}, f"{name.rpartition('.')[0]}.moe_gate.weight", name)  # raises
    modules = {
        f"model.layers.{name}": _plain(folder, config, name, parts, names)
        for name, parts in group(names, _PART).items()
    }
    _match_targets(config, blocks, modules)
    return RoutedAdapter(modules, "mixlora", config.base_model, blocks=blocks)


def _check_keys(config: Mapping[str, Any], accepted: Collection[str]) -> None:
    for key in _NEEDED:
        _need(config, key)
    strategy = config["routing_strategy"]
    if strategy == "mixlora-switch":
        raise AdapterError(
            "unsupported_feature",
            f"routing_strategy in {CONFIG}: the reference's switch routing gives its input back"
            " unchanged at inference, and drops tokens by their place in the batch", seen=strategy,
            limit="mixlora, mixlora-dynamic", fix="train with one of these",
        )  # fmt: skip
    if strategy not in ("mixlora", "mixlora-dynamic", _LEGACY):
        raise bad_value(f"routing_strategy in {CONFIG}", strategy, "mixlora or mixlora-dynamic")
    check_keys(config, CONFIG, _KEYS, {}, accepted=accepted)
    if config.get("bias", "none") != "none":
        raise AdapterError(
            "unsupported_feature", f"'bias' in {CONFIG}: trained biases cannot be served",
            seen=config["bias"], limit="none", fix="train without it",
        )  # fmt: skip


def _need(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise AdapterError("missing_key", f"{CONFIG} has no '{key}'", fix=f"add '{key}'")
    return config[key]


def _read_config(
    folder: AdapterFolder, names: dict[str, str], experts: dict[str, dict[str, str]]
) -> _Config:
    config = folder.config
    own = _lora(config, CONFIG)
    act = config.get("act_fn")
    if act is not None and not isinstance(act, str):
        raise bad_value(f"act_fn in {CONFIG}", act, "the name of an activation, or null")
    expert = own
    inner = config.get("expert_lora")
    if inner is not None:
        if not isinstance(inner, dict):
            raise bad_value(f"expert_lora in {CONFIG}", inner, "an object")
        where = f"expert_lora of {CONFIG}"
        check_keys(inner, where, _KEYS, {}, accepted=folder.accepted)
        expert = _lora({**config, **inner}, f"expert_lora of {CONFIG}")
        if _ignores_expert_lora(folder, inner, own, expert, names, experts):
            expert = own
    return _Config(
        *own, *expert,
        experts=whole_number(config["num_experts"], f"num_experts in {CONFIG}", 1, MAX_EXPERTS),
        targets=_targets(config["target_modules"]),
        act=act,
        base_model=base_model_of(config, CONFIG),
    )  # fmt: skip


def _lora(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Rank and scale."""
    refuse_lost_dora(config, where)
    rank = whole_number(config["r"], f"r in {where}", 1, MAX_RANK)
    alpha = config["lora_alpha"]
    if not _is_number(alpha) or not -MAX_ALPHA <= alpha <= MAX_ALPHA:
        raise bad_value(f"lora_alpha in {where}", alpha, f"a number up to {MAX_ALPHA:g}")
    rslora = flag(config.get("use_rslora"), f"use_rslora in {where}")
    return rank, alpha / (math.sqrt(rank) if rslora else rank)


def _ignores_expert_lora(
    folder: AdapterFolder,
    inner: Mapping[str, Any],
    own: tuple[int, float],
    expert: tuple[int, float],
    names: dict[str, str],
    experts: dict[str, dict[str, str]],
) -> bool:
    """The PyPI package parses `expert_lora` and then trains its experts without it; MoE-PEFT
    honours it. The former writes `task_type` into it; else the tensors' rank decides."""
    if "task_type" in inner:
        return True
    if own[0] == expert[0]:
        return False
    shapes = (folder.shape(names[n]) for p in experts.values() for k, n in p.items() if "A" in k)
    first = next(shapes, (expert[0],))
    return bool(first) and first[0] == own[0]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _targets(targets: Any) -> frozenset[str]:
    if isinstance(targets, dict) and all(isinstance(v, bool) for v in targets.values()):
        return frozenset(name for name, used in targets.items() if used)
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        return frozenset(targets)
    limit = "a list of names, or an object of true and false"
    raise bad_value(f"target_modules in {CONFIG}", targets, limit)


def _dynamic(config: Mapping[str, Any]) -> dict[str, Any]:
    """Experts up to and including the one that crosses top_p, not renormalised. The temperature
    divides the probabilities themselves: it scales the weights and moves the bound."""
    top_p, temperature = _need(config, "top_p"), _need(config, "temperature")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise bad_value(f"top_p in {CONFIG}", top_p, "> 0, at most 1")
    if not _is_number(temperature) or not 0 <= temperature <= 1e6:
        raise bad_value(f"temperature in {CONFIG}", temperature, "0 (off) or above")
    if not temperature:
        return {"select": "top_p", "top_p": float(top_p)}
    bound = top_p * temperature
    if bound >= 1:
        return {"constant": 1 / temperature}
    return {"select": "top_p", "top_p": bound, "constant": 1 / temperature}


def _experts(
    folder: AdapterFolder,
    config: _Config,
    name: str,
    parts: dict[str, str],
    names: dict[str, str],
) -> LowRank:
    r = config.expert_rank
    a_names = [names[part(parts, f"experts.{e}.lora_A", name)] for e in range(config.experts)]
    b_names = [names[part(parts, f"experts.{e}.lora_B", name)] for e in range(config.experts)]
    for tensor in a_names:
        if folder.shape(tensor)[:1] != (r,) or len(folder.shape(tensor)) != 2:
            raise rank_mismatch(tensor, folder.shape(tensor), f"[{r}, in]")
    for tensor in b_names:
        if folder.shape(tensor)[1:] != (r,):
            raise rank_mismatch(tensor, folder.shape(tensor), f"[out, {r}]")
    for alike, at in ((a_names, 1), (b_names, 0)):
        if len({folder.shape(tensor)[at] for tensor in alike}) > 1:
            raise AdapterError(
                "bad_shape", f"the experts of {name} have different sizes",
                seen=[folder.shape(tensor) for tensor in alike[:4]], fix="save the adapter again",
            )  # fmt: skip
    return LowRank(
        torch.cat([folder.take(tensor) for tensor in a_names]),
        torch.cat([folder.take(tensor) for tensor in b_names], dim=1) * config.expert_scale,
    )


def _plain(
    folder: AdapterFolder,
    config: _Config,
    name: str,
    parts: dict[str, str],
    names: dict[str, str],
) -> RoutedModule:
    a_name, b_name = (names[part(parts, f"lora_{letter}", name)] for letter in "AB")
    r = config.rank
    if len(folder.shape(a_name)) != 2 or folder.shape(a_name)[0] != r:
        raise rank_mismatch(a_name, folder.shape(a_name), f"[{r}, in] (r in {CONFIG})")
    if folder.shape(b_name)[1:] != (r,):
        raise rank_mismatch(b_name, folder.shape(b_name), f"[out, {r}] (r in {CONFIG})")
    return RoutedModule(folder.take(a_name), folder.take(b_name) * config.scale)


def _match_targets(
    config: _Config, blocks: Mapping[str, MixBlock], modules: Mapping[str, RoutedModule]
) -> None:
    """Linears adapted in one layer are so in every layer, and the config names them."""
    names = [*modules, *(f"{name}.{p}" for name, block in blocks.items() for p in block.parts)]
    have = {(name.split(".")[2], name.rpartition(".")[2]) for name in names}
    layers = {layer for layer, _ in have} | {name.split(".")[2] for name in blocks}
    for layer, target in sorted({(layer, target) for layer in layers for _, target in have}):
        if target not in config.targets:
            raise AdapterError(
                "unexpected_tensor", f"there are tensors of a layer that target_modules in {CONFIG}"
                " does not name", seen=target, fix="add it to target_modules",
            )  # fmt: skip
        if (layer, target) not in have:
            raise AdapterError(
                "missing_tensor", f"layer {layer} has no tensors of {target}, other layers have",
                fix="save the adapter again",
            )  # fmt: skip


def _modern_names(folder: AdapterFolder) -> dict[str, str]:
    """Tensor names as the packages write them today → as they stand in the file."""
    if folder.config.get("routing_strategy") != _LEGACY:
        return {name: name for name in folder.names}
    found = {}
    for name in folder.names:
        old = _OLD.fullmatch(name)
        if old is None:
            found[name] = name
            continue
        stem = f"{_PREFIX}{old['layer']}.mlp."
        if old["gate"]:
            found[f"{stem}moe_gate.weight"] = name
        else:
            linear = _OLD_LINEARS[old["linear"]]
            found[f"{stem}{linear}.experts.{old['expert']}.{old['letter']}.weight"] = name
    return found


READER = Reader(
    name="mixlora",
    title="MixLoRA",
    url="https://github.com/TUDB-Labs/MixLoRA",
    files="adapter_config.json (peft_type MIXLORA, routing_strategy, num_experts), "
    "adapter_model.safetensors with mixlora.layers.N.mlp.moe_gate.weight, "
    "mixlora.layers.N.mlp.gate_proj.experts.E.lora_A.weight, ... (the packages write "
    "adapter_model.bin: `convert --allow-pickle`)",
    peft_types=("MIXLORA",),
    detect=detect,
    read=read,
    paper="Li et al. 2024, MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based"
    " Mixture of Experts, arXiv 2404.15159",
    summary="Whole MLP blocks are the experts: one router per block picks k of them, their outputs"
    " are mixed after the non-linearity. The attention's linears carry one ordinary LoRA each.",
    formula="y = sum_e v_e (down(a_e) + s B_d A_d a_e)\n"
    "v = top-k of softmax(W_g x), renormalised\n"
    "a_e = act(gate(x) + s B_g A_g x) * (up(x) + s B_u A_u x)",
    traps=(
        "The base model's MLP survives only because the weights sum to one; the dynamic (top-p)"
        " strategy does not renormalise, and drops a part of it.",
        "`act_fn` missing means the model's own activation; the reference package fails there.",
        "`expert_lora` is honoured by MoE-PEFT and ignored by the PyPI package `mixlora`. A file of"
        " the latter carries `task_type` in it; otherwise the tensors' rank decides.",
        "`jitter_noise` is noise for training. The PyPI package applies it at inference too; it is"
        " not served.",
        "In the dynamic strategy `temperature` divides the probabilities, not the logits.",
        "DoRA experts are refused: both packages save A and B only, so the trained magnitudes are"
        " lost; what they load again computes the same as without DoRA.",
        "The switch strategy is refused.",
    ),
)
