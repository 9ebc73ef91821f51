"""Arrow (PEFT): a library of ordinary adapters, routed without any trained router.

    y = W x + sum_{e in topk |P x|} softmax(|P x|_topk / T)_e · s_e B_e A_e x

P_e, the prototype of expert e, comes from B_e A_e itself (`adapters.prototypes`). GenKnowSub
subtracts the mean of general adapters from A and from B of every expert first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.prototypes import prototypes
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.bundle import (
    ExpertFolder,
    expert_names,
    read_expert,
    refuse_others,
    same_base,
    same_layers,
)
from vllm_lora_ext.adapters.readers.peft_config import bad_value, flag, whole_number
from vllm_lora_ext.errors import AdapterError

ROUTER_FOLDER = "arrow_router"  # as PEFT names the router when it saves the whole model
_ROUTER_TENSOR = re.compile(r".+\.lora_[AB]\.weight")
_SAVED_KEYS = frozenset({
    "task_adapter_names", "gks_adapter_names", "top_k", "router_temperature", "use_gks", "rng_seed",
})  # fmt: skip
_SETTINGS = {
    "task_adapter_names": "the experts' folders (or `expert_order`)",
    "top_k": "how many experts a token uses",
    "router_temperature": "of the softmax over the chosen experts (or `temperature`)",
    "rng_seed": "where PEFT's power iteration starts; not with `prototypes` svd",
    "prototypes": "power (PEFT's 15 steps of power iteration, the default) or svd (exact singular"
    " vectors: another adapter than PEFT computes, but one that needs no seed)",
    "gks_adapter_names": "the general adapters' folders, for GenKnowSub",
    "use_gks": "whether to subtract them; true when they are named",
}


@dataclass(frozen=True)
class _Settings:
    tasks: list[str]
    general: list[str]  # to be subtracted
    k: Any
    temperature: Any
    seed: int | None  # None: exact singular vectors


def detect(folder: AdapterFolder) -> bool:
    if folder.has_config:
        return folder.config.get("peft_type") == "LORA" and bool(folder.config.get("arrow_config"))
    # With `scaling` it is MeteoRA, with `system` LoRA-Mixer, each without its weights file.
    other = folder.has_setting("scaling") or folder.has_setting("system")
    return folder.no_weights is not None and not other and bool(folder.subfolders())


def read(folder: AdapterFolder) -> RoutedAdapter:
    settings = _read_settings(folder, _saved_config(folder))
    experts = [read_expert(folder, name) for name in settings.tasks]
    general = [read_expert(folder, name) for name in settings.general]
    layers = same_layers(experts + general)
    modules = {name: _read_module(name, experts, general, settings) for name in layers}
    return RoutedAdapter(modules, system="arrow", base_model=same_base(experts + general))


def _saved_config(folder: AdapterFolder) -> dict[str, Any]:
    """PEFT's `arrow_config`, from this folder or from the router's beside the experts."""
    holder, where = folder, "adapter_config.json"
    if not folder.has_config:
        if ROUTER_FOLDER not in folder.subfolders():
            return {}
        holder, where = folder.subfolder(ROUTER_FOLDER), f"{ROUTER_FOLDER}/adapter_config.json"
    # The router's own A and B are there because PEFT makes every adapter with them: never used.
    holder.skip(name for name in holder.names if _ROUTER_TENSOR.fullmatch(name))
    saved = holder.config.get("arrow_config")
    if not isinstance(saved, dict):
        raise bad_value(f"arrow_config in {where}", saved, "an object")
    for key in sorted(set(saved) - _SAVED_KEYS):
        raise AdapterError(
            "unknown_key", f"arrow_config in {where} holds an unknown key '{key}'",
            seen=saved[key], limit=sorted(_SAVED_KEYS), fix="remove it",
        )  # fmt: skip
    return saved


def _read_settings(folder: AdapterFolder, saved: dict[str, Any]) -> _Settings:
    tasks = _names(folder, saved, "task_adapter_names", "expert_order")
    if not tasks:
        raise AdapterError(
            "missing_setting", "'task_adapter_names' (the experts' folders) is in no file of this"
            " adapter, which looks like Arrow's: a folder of adapters without weights of its own",
            seen=[f for f in folder.subfolders() if f != ROUTER_FOLDER][:16],
            fix=f'add "task_adapter_names" to {SIDECAR}: these folders without the general ones',
        )  # fmt: skip
    general = _names(folder, saved, "gks_adapter_names")
    both = sorted(set(tasks) & set(general))
    if both:
        raise AdapterError(
            "setting_mismatch", "a folder stands in task_adapter_names and in gks_adapter_names",
            seen=both[0], fix="name it once",
        )  # fmt: skip
    refuse_others(
        folder, {*tasks, *general, ROUTER_FOLDER}, "task_adapter_names or gks_adapter_names"
    )
    return _Settings(
        tasks=tasks,
        general=general if _subtracts(folder, saved, general) else [],
        k=_value(folder, saved, "top_k"),
        temperature=_value(folder, saved, "router_temperature", "temperature"),
        seed=_seed(folder, saved),
    )


def _names(folder: AdapterFolder, saved: dict[str, Any], *keys: str) -> list[str]:
    """Folder names; the sidecar comes first, as PEFT calls its adapters task_0, task_1, ..."""
    own = saved.get(keys[0]) or []
    given = _given(folder, keys)
    value = own if given is None else given
    if value == []:
        return []
    names = expert_names(folder, value, keys[0])
    if given is not None and own and len(own) != len(given):
        raise AdapterError(
            "setting_mismatch", f"'{keys[0]}' in {SIDECAR} and in arrow_config differ in number",
            seen=len(given), limit=len(own), fix="name every adapter once",
        )  # fmt: skip
    return names


def _given(folder: AdapterFolder, keys: tuple[str, ...]) -> Any:
    """What the sidecar says under one of the names of a setting, None when it says nothing."""
    values = [folder.setting(key, _SETTINGS[keys[0]]) for key in keys if folder.has_setting(key)]
    if len(values) > 1 and values[0] != values[1]:
        raise AdapterError(
            "setting_mismatch", f"'{keys[0]}' and '{keys[1]}' in {SIDECAR} are the same setting",
            seen=values[1], limit=values[0], fix="give it once",
        )  # fmt: skip
    return values[0] if values else None


def _value(folder: AdapterFolder, saved: dict[str, Any], *keys: str) -> Any:
    given, own = _given(folder, keys), saved.get(keys[0])
    if given is None and own is None:
        return folder.setting(keys[0], _SETTINGS[keys[0]])
    if given is not None and own is not None and given != own:
        raise AdapterError(
            "setting_mismatch", f"'{keys[0]}' in {SIDECAR} is not that of arrow_config",
            seen=given, limit=own, fix=f"remove it from {SIDECAR}",
        )  # fmt: skip
    return own if given is None else given


def _subtracts(folder: AdapterFolder, saved: dict[str, Any], general: list[str]) -> bool:
    given = _given(folder, ("use_gks",))
    stated = given if given is not None else saved.get("use_gks")
    wanted = bool(general) if stated is None else flag(stated, "use_gks")
    if wanted and given is None and saved:
        raise AdapterError(
            "missing_setting", "'use_gks' must be said again: PEFT subtracts the general adapters"
            " in place when the model first runs, and does not write whether it was saved before",
            fix=f'add "use_gks" to {SIDECAR}: true when the model was saved before its first run,'
            " false when the saved experts are already without the general knowledge",
        )  # fmt: skip
    if wanted and not general:
        raise AdapterError(
            "missing_setting", "'use_gks' is true, and no general adapters are named",
            fix=f'add "gks_adapter_names" to {SIDECAR}',
        )  # fmt: skip
    return wanted


def _seed(folder: AdapterFolder, saved: dict[str, Any]) -> int | None:
    mode = _given(folder, ("prototypes",))
    if mode not in (None, "power", "svd"):
        raise bad_value("prototypes", mode, "power or svd")
    if mode == "svd":
        return None
    given, own = _given(folder, ("rng_seed",)), saved.get("rng_seed")
    if given is None and own is None:
        raise AdapterError(
            "missing_setting", "'rng_seed' is in no file of this adapter: without it, PEFT itself"
            " computes other prototypes, and so another model, at every load",
            fix=f'add "rng_seed" to {SIDECAR}, or "prototypes": "svd" for the exact singular'
            " vectors, which are not PEFT's; a MeteoRA folder lacks its model.safetensors",
        )  # fmt: skip
    return whole_number(_value(folder, saved, "rng_seed"), "rng_seed", -(2**63), 2**64 - 1)


def _read_module(
    name: str, experts: list[ExpertFolder], general: list[ExpertFolder], settings: _Settings
) -> RoutedModule:
    if general:
        _check_same_rank(name, experts + general)
    shift_A: torch.Tensor | float = 0.0
    shift_B: torch.Tensor | float = 0.0
    if general:
        shift_A = torch.stack([e.modules[name].a_RK for e in general]).mean(0)
        shift_B = torch.stack([e.modules[name].b_NR for e in general]).mean(0)
    pairs = [(e.modules[name].a_RK - shift_A, e.modules[name].b_NR - shift_B) for e in experts]
    scaled = [b * e.config.scale(name) for e, (_, b) in zip(experts, pairs, strict=True)]
    gate = {
        "source": "prototype", "blocks": [a.shape[0] for a, _ in pairs], "score": "abs",
        "select": "top_k", "k": settings.k, "weight": "softmax",
        "temperature": settings.temperature,
    }  # fmt: skip
    return RoutedModule(
        a_RK=torch.cat([a for a, _ in pairs]),
        b_NR=torch.cat(scaled, dim=1),
        gate=make_gate(gate, f"{name} (top_k, router_temperature)"),
        router_GK=prototypes(pairs, settings.seed),
    )


def _check_same_rank(module: str, experts: list[ExpertFolder]) -> None:
    ranks = {e.name: e.modules[module].rank for e in experts}
    if len(set(ranks.values())) > 1:
        raise AdapterError(
            "rank_mismatch", f"the adapters differ in rank at {module}: general ones cannot be"
            " subtracted", seen=ranks, limit="one rank", fix="train all with one r",
        )  # fmt: skip


READER = Reader(
    name="arrow",
    title="Arrow (PEFT), with GenKnowSub",
    url="https://github.com/huggingface/peft",
    files="LoRA adapters (PEFT) in subfolders, and routing.json (task_adapter_names, top_k, "
    "router_temperature, rng_seed) or PEFT's arrow_config; no weights of its own",
    peft_types=(),  # its own config is not needed; where PEFT wrote one, it says LORA
    detect=detect,
    read=read,
    paper="Towards Modular LLMs by Building and Reusing a Library of LoRAs,"
    " https://arxiv.org/abs/2405.11157; GenKnowSub, https://aclanthology.org/2025.acl-short.54/",
    summary="Every linear routes its input by |prototype · x| to the k nearest experts, weighted"
    " by a softmax. A prototype is the main input direction of the expert's own B A, so nothing"
    " is trained. GenKnowSub first subtracts the mean of general adapters from A and from B.",
    formula="y = W x + sum_{e in topk |P x|} softmax(|P x|_topk / T)_e · s_e B_e A_e x",
    settings=_SETTINGS,
    traps=(
        "PEFT saves no prototypes: it rebuilds them from a random start at the first forward, so"
        " rng_seed is part of the model, and a null seed gives another model at every load.",
        "15 power iterations do not reach the singular vector when the leading singular values"
        " are close: prototypes svd is a different, equally well defined router.",
        "The start depends on torch's generator of the device: PEFT on a GPU draws another vector"
        " than on a CPU, whose numbers are reproduced here.",
        "GenKnowSub subtracts means of A and of B, not the mean of B A, and before prototypes.",
        "PEFT subtracts in place: a model saved after it ran holds experts without the general"
        " knowledge, and reloading would subtract twice; routing.json must then say use_gks.",
        "PEFT demands one rank for all experts; here experts may differ unless general adapters"
        " are subtracted.",
    ),
)
