"""Ordinary LoRA as PEFT saves it: one A and one B per layer, no gate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers import peft_parts
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import PREFIX, group, module_of, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, flag, read_peft_config
from vllm_lora_ext.errors import AdapterError

_DORA = "use_dora"
# PEFT keeps the adapter's name in the middle when a state dict is saved by hand.
_LINEAR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(\.\w+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_[AB])(\.\w+)?(\.weight)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.(?P<part>lora_magnitude_vector)(\.\w+)*")
_TRAINING = re.compile(r"(?P<module>.+)\.lora_(?P<of>velora|monteclora)_(embed|sampler)(\.\w+)*")


def detect(folder: AdapterFolder) -> bool:
    """Whether it holds pairs of an ordinary LoRA: it may be more, if another reader claims it."""
    return folder.config.get("peft_type") == "LORA" and any(
        _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name) for name in folder.names
    )


def read(folder: AdapterFolder, also: Collection[str] = ()) -> RoutedAdapter:
    """The adapter; `also`: keys of the config that the caller reads itself."""
    config, pairs = read_pairs(folder, also={*peft_parts.KEYS, _DORA, *also})
    heads = peft_parts.read_heads(folder, config.where)
    experts = peft_parts.read_experts(folder, config)
    if flag(folder.config.get(_DORA), f"{_DORA} in {config.where}"):
        pairs = _with_magnitudes(folder, pairs, experts, config.where)
    else:
        _refuse_magnitudes(folder.names)
    targets = peft_parts.names_of(folder, "target_parameters", config.where)
    modules = {
        name: dataclasses.replace(
            pair, b_NR=pair.b_NR * config.scale(peft_parts.parameter_of(name, targets))
        )
        for name, pair in pairs.items()
    }
    return RoutedAdapter(
        modules, system="plain", base_model=config.base_model, heads=heads, experts=experts
    )


def read_pairs(
    folder: AdapterFolder, where: str = "adapter_config.json", also: Collection[str] = ()
) -> tuple[PeftLora, dict[str, RoutedModule]]:
    """An ordinary LoRA before its scales are folded in: B as it is stored.

    Args:
        where: the config file, for messages.
        also: keys of the config that the caller reads itself, with their tensors.
    Raises:
        AdapterError: as `read`.
    """
    config = read_peft_config(folder.config, where, also, accepted=folder.accepted)
    if _DORA not in also:
        _refuse_magnitudes(folder.names)
    fused = peft_parts.fused_modules(folder.names) if also else {}
    linear, embedding = group(folder.names, _LINEAR), group(folder.names, _EMBEDDING)
    linear = {name: parts for name, parts in linear.items() if name not in fused}
    targets = peft_parts.names_of(folder, "target_parameters", where) if also else []
    both = sorted(set(linear) & set(embedding))
    if both:
        raise AdapterError(
            "duplicate_tensor", f"{both[0]} is adapted both as a linear and as an embedding",
            fix="save one adapter per folder",
        )  # fmt: skip
    modules = {}
    for name, parts in linear.items():
        rank = config.rank(peft_parts.parameter_of(name, targets))
        modules[name] = _read_pair(folder, config, name, parts, "lora_", rank)
    for name, parts in embedding.items():
        rank = config.rank(name)
        modules[name] = _read_pair(folder, config, name, parts, "lora_embedding_", rank)
    _skip_base_embeddings(folder, modules)
    _skip_training(folder, modules)
    return config, modules


def _read_pair(
    folder: AdapterFolder,
    config: PeftLora,
    module: str,
    parts: dict[str, str],
    stem: str,
    rank: int,
) -> RoutedModule:
    a_name, b_name = part(parts, f"{stem}A", module), part(parts, f"{stem}B", module)
    a_shape, b_shape = folder.shape(a_name), folder.shape(b_name)
    if len(a_shape) != 2 or a_shape[0] != rank:
        raise rank_mismatch(a_name, a_shape, f"[{rank}, in] (r in {config.where})")
    if len(b_shape) != 2 or b_shape[1] != rank:
        raise rank_mismatch(b_name, b_shape, f"[out, {rank}] (r in {config.where})")
    return RoutedModule(
        a_RK=folder.take(a_name),
        b_NR=folder.take(b_name),
        kind="embedding" if stem == "lora_embedding_" else "linear",
    )


def _with_magnitudes(
    folder: AdapterFolder,
    pairs: dict[str, RoutedModule],
    experts: Collection[str],
    where: str,
) -> dict[str, RoutedModule]:
    """The layers of a DoRA: each has a magnitude for each of its outputs."""
    other = [name for name, pair in pairs.items() if pair.kind != "linear"] + list(experts)
    if other:
        raise AdapterError(
            "unsupported_feature", f"'{_DORA}' in {where}: DoRA is served on linear layers only",
            seen=other[0], fix="train that layer without DoRA, or not at all",
        )  # fmt: skip
    found = group(folder.names, _MAGNITUDE)
    for name in sorted(set(found) - set(pairs)):
        raise AdapterError(
            "unexpected_tensor", "there is a magnitude of a layer that is not adapted", seen=name,
            fix="save the adapter again",
        )  # fmt: skip
    return {
        name: dataclasses.replace(pair, magnitude_N=_magnitude(folder, found.get(name, {}), name))
        for name, pair in pairs.items()
    }


def _magnitude(folder: AdapterFolder, parts: dict[str, str], name: str) -> torch.Tensor:
    return folder.take(part(parts, "lora_magnitude_vector", name))


def _refuse_magnitudes(names: list[str]) -> None:
    found = [name for name in names if "lora_magnitude_vector" in name]
    if found:
        raise AdapterError(
            "unsupported_feature", "the adapter has DoRA's magnitude vectors, which are served of"
            f" an ordinary LoRA whose config says '{_DORA}' only", seen=found[0],
            fix="save the adapter again with PEFT, or train it without DoRA",
        )  # fmt: skip


def _skip_base_embeddings(folder: AdapterFolder, modules: dict[str, RoutedModule]) -> None:
    """PEFT saves a copy of the base weight beside an adapted embedding or output matrix."""
    for name in folder.names:
        module = name.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        if name.endswith(".base_layer.weight") and module in modules:
            out, width = modules[module].b_NR.shape[0], modules[module].a_RK.shape[1]
            rows = (width, out) if modules[module].kind == "embedding" else (out, width)
            if folder.shape(name) == rows:
                folder.skip([name])


def _skip_training(folder: AdapterFolder, modules: dict[str, RoutedModule]) -> None:
    """What VeLoRA and MonteCLoRA need beside A and B, to train only."""
    for name in folder.names:
        found = _TRAINING.fullmatch(name)
        if found is None or module_of(found["module"]) not in modules:
            continue
        if folder.config.get(f"{found['of']}_config"):
            folder.skip([name])


READER = Reader(
    name="plain",
    title="LoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type LORA), adapter_model.safetensors with "
    "<module>.lora_A.weight and <module>.lora_B.weight",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685)",
    summary="One pair of low-rank matrices per layer and no gate. Served as stock vLLM does.",
    formula="y = W x + alpha/r B A x;  alpha / sqrt(r) with use_rslora",
    traps=(
        "rank_pattern and alpha_pattern change r and alpha of single layers, and are honoured.",
        "Trained biases and adapters that changed the base weights when training began "
        "(PiSSA, OLoRA, CorDA, LoftQ) are refused by name; so is modules_to_save, but for the "
        "score or classifier of a classification model.",
        "LoRA on parameters (target_parameters) is served on the fused experts of MoE models, and "
        "on routers.",
        "target_modules and its kin choose layers for training; the tensors say which they are.",
    ),
    general=2,
)
