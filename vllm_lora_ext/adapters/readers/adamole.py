"""AdaMoLE and MoLE (github.com/zefang-liu/AdaMoLE): experts above a learned, or a fixed, bar.

    p = softmax(R x)    y = W x + sum_e w_e · alpha/r · B_e A_e x

    AdaMoLE          t = max_threshold · sigmoid(h x + c)    w = relu(p - t), divided by its sum
    MoLE, top-k      w = p on its top_k, divided by its sum
    MoLE, threshold  w = p where p >= threshold, divided by its sum; 0 when there is none

`max_threshold: null` means 1 / num_experts. The files hold every expert twice, the second time
below `moe_layer`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import (
    Stack,
    early_peft_config,
    expert_count,
    needed,
    number,
)
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, whole_number
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_gating\.weight|lora_threshold\.(weight|bias)"
    r"|lora_[AB]\.(0|[1-9]\d{0,5})\.weight"
    r"|moe_layer\.experts\.(0|[1-9]\d{0,5})\.lora_[AB]\.weight)"
)
_MARK = re.compile(r".+\.(lora_gating|lora_threshold|lora_[AB]\.\d+)\.(weight|bias)")
_STACK = Stack("lora_A.{}.weight", "lora_B.{}.weight", "lora_gating.weight")
_MAX_THRESHOLD = 1e6


def detect_adamole(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "ADAMOLE" and any(map(_MARK.fullmatch, folder.names))


def detect_mole(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "MOLE" and any(map(_MARK.fullmatch, folder.names))


def read_adamole(folder: AdapterFolder) -> RoutedAdapter:
    needed(folder.config, ("max_threshold",))
    experts = expert_count(folder.config, "num_experts")
    highest = folder.config["max_threshold"]
    gate = {
        "select": "threshold", "threshold_head": True, "subtract_threshold": True,
        "threshold": 1 / experts if highest is None else _threshold(highest, "max_threshold"),
    }  # fmt: skip
    return _read(folder, "adamole", "AdaMoLE", gate, ("max_threshold",))


def read_mole(folder: AdapterFolder) -> RoutedAdapter:
    experts = expert_count(folder.config, "num_experts")
    k, lowest = folder.config.get("top_k"), folder.config.get("threshold")
    if k is None and lowest is None:
        raise AdapterError(
            "missing_key", f"{CONFIG} must say either top_k or threshold", fix="add one of them"
        )
    if k is not None and lowest is not None:
        raise AdapterError(
            "bad_value", f"{CONFIG} must say either top_k or threshold",
            seen=f"top_k {k}, threshold {lowest}", limit="one of them",
            fix="set the other one to null",
        )  # fmt: skip
    gate: dict[str, Any] = {"select": "threshold"}
    if k is not None:
        gate = {
            "select": "top_k", "k": whole_number(k, f"top_k in {CONFIG}", 1, experts)
        }  # fmt: skip
    else:
        gate["threshold"] = _threshold(lowest, "threshold")
    return _read(folder, "mole", "MoLE", gate, ("top_k", "threshold"))


def _threshold(value: object, key: str) -> float:
    return number(value, f"{key} in {CONFIG}", -_MAX_THRESHOLD, _MAX_THRESHOLD)


def _read(
    folder: AdapterFolder, system: str, title: str, gate: dict[str, Any], keys: tuple[str, ...]
) -> RoutedAdapter:
    needed(folder.config, ("lora_rank",))
    if "r" in folder.config:
        raise AdapterError(
            "unknown_key", f"{CONFIG} of {title} has 'lora_rank' and no 'r'",
            seen=folder.config["r"], fix="remove 'r'",
        )  # fmt: skip
    config = early_peft_config(
        {**folder.config, "r": folder.config["lora_rank"]}, title,
        ("lora_rank", "num_experts", *keys), folder.accepted,
    )  # fmt: skip
    experts = expert_count(folder.config, "num_experts")
    fields = {
        "blocks": [config.r] * experts, "score": "softmax", "weight": "renormalise", **gate,
    }  # fmt: skip
    modules = {
        name: _read_module(folder, config, name, parts, fields)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system=system, base_model=config.base_model)


def _read_module(
    folder: AdapterFolder, config: PeftLora, module: str, parts: dict[str, str],
    fields: dict[str, Any],
) -> RoutedModule:  # fmt: skip
    scale = config.alpha / config.r
    made = _STACK.read(folder, module, parts, fields, scale)
    experts = len(fields["blocks"])
    _check_copies(folder, parts, "A", made.a_RK.chunk(experts), 1.0)
    _check_copies(folder, parts, "B", made.b_NR.chunk(experts, dim=1), scale)
    if not fields.get("threshold_head"):
        return made
    head_K, head_bias = _read_head(folder, parts, module, made.a_RK.shape[1])
    return replace(made, head_K=head_K, head_bias=head_bias)


def _check_copies(
    folder: AdapterFolder, parts: dict[str, str], side: str,
    originals: tuple[torch.Tensor, ...], scale: float,
) -> None:  # fmt: skip
    """The copies below `moe_layer` are the same parameters: another value is a broken file."""
    for e, original in enumerate(originals):
        name = parts.get(f"moe_layer.experts.{e}.lora_{side}.weight")
        if name and not torch.equal(folder.take(name) * scale, original):
            raise AdapterError(
                "duplicate_tensor", f"'{name}' is a copy, and differs from what it is a copy of",
                fix="save the adapter again, or remove the moe_layer tensors",
            )  # fmt: skip


def _read_head(
    folder: AdapterFolder, parts: dict[str, str], module: str, width: int
) -> tuple[torch.Tensor, float]:
    for what, shape in (("weight", (1, width)), ("bias", (1,))):
        name = part(parts, f"lora_threshold.{what}", module)
        if folder.shape(name) != shape:
            raise AdapterError(
                "bad_shape", f"'{name}' has the wrong shape", seen=list(folder.shape(name)),
                limit=list(shape), fix="save the adapter again",
            )  # fmt: skip
    weight_1K = folder.take(parts["lora_threshold.weight"])
    return weight_1K[0], float(folder.take(parts["lora_threshold.bias"]))


_FILES = (
    "adapter_config.json (peft_type {}, lora_rank, num_experts, {}), adapter_model.safetensors "
    "with <module>.lora_gating.weight, .lora_A.0.weight, .lora_B.0.weight, ...{}"
)
_PAPER = (
    "AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation "
    "Experts (arXiv 2405.00361)"
)
_TRAPS = (
    "The rank is called lora_rank in the config, not r; the scale is alpha / lora_rank.",
    "Every expert stands in the file twice (moe_layer.experts.N.lora_A.weight): the copies must "
    "be equal and are not used.",
)

ADAMOLE = Reader(
    name="adamole",
    title="AdaMoLE",
    url="https://github.com/zefang-liu/AdaMoLE",
    files=_FILES.format("ADAMOLE", "max_threshold", ", .lora_threshold.weight, .bias"),
    peft_types=("ADAMOLE",),
    detect=detect_adamole,
    read=read_adamole,
    paper=_PAPER,
    summary="A softmax router and a learned threshold per linear: the experts whose probability "
    "is at least the token's threshold are used, weighted by how far they are above it.",
    formula="p = softmax(R x);  t = max_threshold sigmoid(h x + c);  w = relu(p - t);  "
    "y = W x + alpha/r sum_e w_e / (sum w) B_e A_e x",
    traps=(
        "max_threshold null means 1 / num_experts, which leaves at least one expert to every "
        "token. With a larger one a token may have none: it is then the base model's.",
        *_TRAPS,
    ),
)

MOLE = Reader(
    name="mole",
    title="MoLE (of AdaMoLE)",
    url="https://github.com/zefang-liu/AdaMoLE",
    files=_FILES.format("MOLE", "top_k or threshold", ""),
    peft_types=("MOLE",),
    detect=detect_mole,
    read=read_mole,
    paper=_PAPER + ", where it is the baseline",
    summary="A softmax router per linear: the top_k experts, or all experts whose probability is "
    "at least a fixed threshold, with renormalised weights.",
    formula="p = softmax(R x);  w = p on its top_k, or where p >= threshold, 0 elsewhere;  "
    "y = W x + alpha/r sum_e w_e / (sum w) B_e A_e x",
    traps=(
        "With a threshold above 1 / num_experts a token may have no expert: it is then the base "
        "model's.",
        *_TRAPS,
    ),
)
