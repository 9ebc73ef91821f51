"""X-LoRA, as PEFT saves it (peft_type XLORA) and as its authors' package does.

    y_t = W x_t + c · sum_e s_e B_e A_e (S_te x_t)     S_t = classifier(h_t)

h_t is the base model's last hidden state of the same token, in a pass without the experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.adapters.folder import CONFIG, SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.gates import BOUNDS, make_gate
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.bundle import (
    ExpertFolder,
    expert_names,
    read_expert,
    refuse_others,
    same_base,
)
from vllm_lora_ext.adapters.readers.experts import number
from vllm_lora_ext.adapters.readers.peft_config import (
    MAX_ALPHA,
    MAX_RANK,
    bad_value,
    base_model_of,
    check_keys,
    flag,
    whole_number,
)
from vllm_lora_ext.adapters.readers.tuners import bad_shape, take_shaped
from vllm_lora_ext.errors import AdapterError

NAME = "xlora"
ORIGINAL_CONFIG = "xlora_config.json"
_PEFT = re.compile(
    r"(base_model\.)?internal_xlora_classifier\.layers\.(?P<at>\d+)\.(?P<part>weight|bias)"
)
_ORIGINAL = re.compile(r"(inner\.(?P<at>\d+)|last)\.(?P<part>weight|bias)")
_MAX_DEPTH = 256
# Written for training, or read from the tensors.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "base_model_id", "inference_mode", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type", "use_trainable_adapters",
})  # fmt: skip
_OWN = frozenset({
    "adapters", "enable_softmax", "enable_softmax_topk", "global_scaling_weight", "hidden_size",
    "layerwise_scalings", "scaling_pass_value", "softmax_temperature", "top_k_lora", "xlora_depth",
    "xlora_dropout_p", "xlora_size",
})  # fmt: skip
_AUTHORS = frozenset({"enable_relu_and_dropout", "use_bias"})
_SETTINGS = {
    "adapters": "the experts' folders in the classifier's order, where xlora_config.json has none",
    "layers": "names of all adapted layers in the order of the model's modules, which is that of"
    " the classifier's rows; only with layerwise_scalings, and only where the layers are not those"
    " of Llama",
    "gates": '"exact", which it is without this key, or "frozen": tokens behind the prompt take the'
    " gates of its last one, an approximation that runs them through the model once",
}
_GATES = ("exact", "frozen")
# In the order in which transformers' models of Llama's kind make them: PEFT counts them so.
_ORDER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_LAYER = re.compile(r"(model\.)?layers\.(?P<number>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class _Config:
    """What both layouts' configs say."""

    where: str
    base_model: str
    hidden: int
    size: int
    depth: int
    layerwise: bool
    softmax: bool
    temperature: float
    top_k: int | None
    again: bool
    weight: float


def detect(folder: AdapterFolder) -> bool:
    if folder.has_config:
        return folder.config.get("peft_type") == "XLORA"
    return bool(folder.names) and all(map(_ORIGINAL.fullmatch, folder.names))


@dataclass(frozen=True)
class _Source:
    """Where a layout has what: the experts' folders, in the classifier's order; the names of its
    layers, first to last, and whether they have biases and ReLUs between them."""

    experts: list[str]
    layers: list[str]
    biased: bool
    relu: bool


def read(folder: AdapterFolder) -> RoutedAdapter:
    if folder.has_config:
        if folder.no_weights is not None:
            raise folder.no_weights
        return _adapter(folder, *_peft(folder))
    return _adapter(folder, *_original(folder))


def _peft(folder: AdapterFolder) -> tuple[_Config, _Source]:
    config = _config(folder, folder.config, CONFIG)
    given = folder.config.get("adapters")
    found = set(given) if isinstance(given, dict) else set()
    names = [str(i) for i in range(len(found))]
    if not found or found != set(names):
        raise bad_value(f"adapters in {CONFIG}", given, 'an object of experts "0", "1", "2", ...')
    names = expert_names(folder, names, f"adapters in {CONFIG}")
    dropout = folder.config.get("xlora_dropout_p", 0.2)
    # A linear, its ReLU and, if there is one, its dropout.
    step = 3 if number(dropout, f"xlora_dropout_p in {CONFIG}", 0, 1) > 0 else 2
    prefix = "base_model." if any(n.startswith("base_model.") for n in folder.names) else ""
    wanted = [step * i for i in range(config.depth)]
    found = {int(m["at"]) for m in map(_PEFT.fullmatch, folder.names) if m}
    lost = sorted(set(wanted) - found)
    if lost:
        raise AdapterError(
            "missing_tensor", "the classifier is incomplete: PEFT drops those of its layers, when"
            " it saves, whose number is also an expert's name", seen=f"layers {sorted(found)}",
            limit=f"layers {wanted}", fix="save the classifier's state_dict() by itself, under the"
            f" names {prefix}internal_xlora_classifier.layers.N.weight and .bias, into"
            " adapter_model.safetensors",
        )  # fmt: skip
    layers = [f"{prefix}internal_xlora_classifier.layers.{at}" for at in wanted]
    return config, _Source(names, layers, biased=True, relu=True)


def _original(folder: AdapterFolder) -> tuple[_Config, _Source]:
    raw = folder.json(ORIGINAL_CONFIG)
    config = _config(folder, raw, ORIGINAL_CONFIG, _AUTHORS)
    if config.again:
        raise AdapterError(
            "unsupported_feature", "with enable_softmax_topk the authors' package takes one softmax"
            " over all tokens of a batch, so that a token's gates depend on later ones", seen=True,
            limit="false", fix="if it was trained with PEFT's softmax of each token, save it as"
            " PEFT's XLORA",
        )  # fmt: skip
    if config.depth > 1 and "enable_relu_and_dropout" not in raw:
        raise AdapterError(
            "missing_key", f"{ORIGINAL_CONFIG} has no 'enable_relu_and_dropout', whose default has"
            " changed between releases", fix="add it",
        )  # fmt: skip
    relu = flag(raw.get("enable_relu_and_dropout"), f"enable_relu_and_dropout in {ORIGINAL_CONFIG}")
    step = 3 if relu else 1
    layers = [*(f"inner.{step * i}" for i in range(config.depth - 1)), "last"]
    biased = flag(raw.get("use_bias", True), f"use_bias in {ORIGINAL_CONFIG}")
    names = _authors_experts(folder, raw.get("adapters"))
    return config, _Source(names, layers, biased, relu)


def _authors_experts(folder: AdapterFolder, given: Any) -> list[str]:
    """Folders in the classifier's order: the config's list, or an object of them."""
    if isinstance(given, dict):
        given = list(given)
    if given is None and not folder.has_setting("adapters"):
        found = folder.subfolders()
        if found != sorted(found, key=_natural):  # the authors list folders as the hub does
            folder.setting("adapters", _SETTINGS["adapters"])
        given = found
    if given is None:
        given = folder.setting("adapters", _SETTINGS["adapters"])
    return expert_names(folder, given, f"adapters in {ORIGINAL_CONFIG} or {SIDECAR}")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _config(
    folder: AdapterFolder, config: Mapping[str, Any], where: str, also: frozenset[str] = frozenset()
) -> _Config:
    check_keys(config, where, _HARMLESS, {}, _OWN | also, folder.accepted)
    for key in ("hidden_size", "layerwise_scalings", "xlora_depth"):
        if key not in config:
            raise AdapterError("missing_key", f"{where} has no '{key}'", fix=f"add {key}")
    passed = config.get("scaling_pass_value")
    if passed not in (None, 0):
        raise AdapterError(
            "unsupported_feature", f"scaling_pass_value in {where}: the experts act in the first"
            " pass as well", seen=passed, limit="0, the base model alone",
            fix="set it to 0, and measure what that costs",
        )  # fmt: skip
    top_k = config.get("top_k_lora")
    low, high = BOUNDS["temperature"]
    return _Config(
        where=where,
        base_model=str(config.get("base_model_id") or base_model_of(dict(config), where)),
        hidden=whole_number(config["hidden_size"], f"hidden_size in {where}", 1, MAX_RANK),
        size=whole_number(config.get("xlora_size", 2048), f"xlora_size in {where}", 1, 1 << 20),
        depth=whole_number(config["xlora_depth"], f"xlora_depth in {where}", 1, _MAX_DEPTH),
        layerwise=flag(config["layerwise_scalings"], f"layerwise_scalings in {where}"),
        softmax=flag(config.get("enable_softmax", True), f"enable_softmax in {where}"),
        temperature=number(
            config.get("softmax_temperature", 1.0), f"softmax_temperature in {where}", low, high
        ),
        top_k=None if top_k is None
        else whole_number(top_k, f"top_k_lora in {where}", 1, MAX_EXPERTS),
        again=flag(config.get("enable_softmax_topk"), f"enable_softmax_topk in {where}"),
        weight=number(
            config.get("global_scaling_weight", 1.0), f"global_scaling_weight in {where}",
            -MAX_ALPHA, MAX_ALPHA,
        ),
    )  # fmt: skip


def _adapter(folder: AdapterFolder, config: _Config, source: _Source) -> RoutedAdapter:
    count = len(source.experts)
    if config.top_k is not None and config.top_k > count:
        raise AdapterError(
            "k_too_large", f"top_k_lora in {config.where} is larger than the number of experts",
            seen=config.top_k, limit=f"1 to {count}", fix="choose a smaller top_k_lora",
        )  # fmt: skip
    refuse_others(folder, source.experts, "adapters")
    experts = [read_expert(folder, name, embeddings=True) for name in source.experts]
    adapted = _in_order(folder, experts, config.layerwise)
    rows = len(adapted) if config.layerwise else 1
    classifier = _classifier(folder, config, source, rows)
    starts = range(0, rows * count, count) if config.layerwise else [0] * len(adapted)
    modules = {
        name: _module(name, experts, start, config.weight)
        for name, start in zip(adapted, starts, strict=True)
    }
    return RoutedAdapter(
        modules, system=NAME, base_model=config.base_model or same_base(experts),
        classifier=classifier,
    )  # fmt: skip


def _classifier(folder: AdapterFolder, config: _Config, source: _Source, rows: int) -> Classifier:
    count = len(source.experts)
    widths = [config.hidden, *[config.size] * (config.depth - 1), rows * count]
    weights, biases = [], []
    for name, width, out in zip(source.layers, widths, widths[1:], strict=False):
        weights.append(take_shaped(folder, f"{name}.weight", out, width))
        biases.append(take_shaped(folder, f"{name}.bias", out) if source.biased else None)
    return Classifier(
        tuple(weights), tuple(biases), count, source.relu, config.softmax, config.temperature,
        config.top_k, config.again, _frozen(folder),
    )  # fmt: skip


def _frozen(folder: AdapterFolder) -> bool:
    if not folder.has_setting("gates"):
        return False
    given = folder.setting("gates", _SETTINGS["gates"])
    if given not in _GATES:
        raise bad_value(f"gates in {SIDECAR}", given, " or ".join(_GATES))
    return bool(given == "frozen")


def _in_order(folder: AdapterFolder, experts: Sequence[ExpertFolder], layerwise: bool) -> list[str]:
    """All adapted layers, in the order in which the model has them."""
    every = {name for expert in experts for name in expert.modules}
    if folder.has_setting("layers"):
        given = folder.setting("layers", _SETTINGS["layers"])
        if not isinstance(given, list) or sorted(map(str, given)) != sorted(every):
            raise bad_value(f"layers in {SIDECAR}", given, f"the {len(every)} adapted layers")
        return given
    places = {name: _place(name) for name in every}
    unknown = sorted(name for name, place in places.items() if place is None)
    if unknown and layerwise:
        raise AdapterError(
            "missing_setting", "'layers' is in no file of this adapter: which row of the classifier"
            " is which layer's follows the order of the model's modules, and that of these is not"
            " known", seen=unknown[:4], limit=_ORDER,
            fix=f'add "layers" to {SIDECAR}: {_SETTINGS["layers"]}',
        )  # fmt: skip
    return sorted(every, key=lambda name: (places[name] or (0, 0, 0), name))


def _place(name: str) -> tuple[int, int, int] | None:
    if name.endswith("embed_tokens"):
        return 0, 0, 0
    if name == "lm_head":
        return 2, 0, 0
    found = _LAYER.fullmatch(name)
    if found is None or found["kind"] not in _ORDER:
        return None
    return 1, int(found["number"]), _ORDER.index(found["kind"])


def _module(name: str, experts: Sequence[ExpertFolder], start: int, weight: float) -> RoutedModule:
    """An expert that does not adapt the layer has one rank of zeros there, so that the layer's
    gates stand side by side."""
    adapting = [expert for expert in experts if name in expert.modules]
    first = adapting[0].modules[name]
    width, out = first.a_RK.shape[1], first.b_NR.shape[0]
    a, b = [], []
    for expert in experts:
        pair = expert.modules.get(name)
        if pair is None:
            a.append(torch.zeros(1, width))
            b.append(torch.zeros(out, 1))
            continue
        if (pair.a_RK.shape[1], pair.b_NR.shape[0], pair.kind) != (width, out, first.kind):
            wanted = f"in {width}, out {out}, as of expert '{adapting[0].name}'"
            raise bad_shape(f"{expert.name}/{name}", tuple(pair.a_RK.shape), wanted)
        a.append(pair.a_RK)
        b.append(weight * expert.scaled_b(name))
    gate = make_gate({"source": "classifier", "blocks": [len(a_RK) for a_RK in a]}, name)
    return RoutedModule(torch.cat(a), torch.cat(b, dim=1), gate, kind=first.kind, row_start=start)


READER = Reader(
    name=NAME,
    title="X-LoRA",
    url="https://github.com/EricLBuehler/xlora",
    files="adapter_config.json (peft_type XLORA) and adapter_model.safetensors with the classifier,"
    " the experts in subfolders 0, 1, ...; or xlora_config.json and xlora_classifier.safetensors,"
    " the experts in subfolders adapter_1, ...",
    peft_types=("XLORA",),
    detect=detect,
    read=read,
    paper="X-LoRA: Mixture of Low-Rank Adapter Experts, https://arxiv.org/abs/2402.07148",
    summary="A classifier over the base model's last hidden state of the same token weights the"
    " experts, for the whole model or per layer. Every token takes two passes, one after the other"
    " ([two_passes.md](../two_passes.md)).",
    formula="y = W x + c · sum_e g_e s_e B_e A_e x, g = softmax(MLP(h) / T), h the token's last"
    " hidden state in a first pass without the adapters",
    settings=_SETTINGS,
    traps=(
        "PEFT 0.21.2 names the experts 0, 1, ... and drops the classifier's layers of the same"
        " numbers when it saves: a saved classifier of depth 1 is empty, of depth 2 lacks layer 0.",
        "It also writes base weights into the experts' folders, and renames what is in them: take"
        " the folders that the experts were trained in.",
        "PEFT and the original both refuse a KV cache. By causality old tokens' gates never"
        " change, so two caches are exact.",
        "top_k_lora masks the weights without renormalising them; enable_softmax_topk is a second"
        " softmax over those that are left. The authors' package takes it over all tokens at once,"
        " which no cache can hold: refused.",
        "Rows of layerwise scalings follow the order of the model's modules, not of names.",
    ),
    two_pass=True,
)
