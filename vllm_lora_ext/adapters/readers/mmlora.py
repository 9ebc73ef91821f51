"""MM-LoRA (github.com/syp2ysy/Arcana): one LoRA for the tokens of images, one for all others."""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import number
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import MAX_ALPHA
from vllm_lora_ext.adapters.readers.sidecar import check_system, every_layer
from vllm_lora_ext.adapters.readers.tuners import take_shaped
from vllm_lora_ext.conditions.column import Column

NAME = "mmlora"
COLUMNS = (Column(modalities=("image",)), Column(modalities=("text",)))
_PART = re.compile(r"(?P<module>.+)\.(?P<part>[VL]_Slora_[AB])\.weight")
# The authors' file is the whole model.
_BASE = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head)\.weight"
    r"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|input_layernorm"
    r"|post_attention_layernorm)\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|model\.(vision_tower|mm_projector|image_newline)(\..+)?"
)
_SETTINGS = {
    "system": f"{NAME} (may be left out)",
    "scaling_visual": "factor of the LoRA of images (2 in the authors' code)",
    "scaling_language": "factor of the LoRA of all other tokens (2 in the authors' code)",
}


def detect(folder: AdapterFolder) -> bool:
    return not folder.has_config and any(map(_PART.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    check_system(folder, NAME)
    scales = [_scale(folder, key) for key in ("scaling_visual", "scaling_language")]
    groups = group(folder.names, _PART)
    forms = sorted({re.sub(r"\blayers\.\d+\.", "layers.{}.", name) for name in groups})
    every_layer(groups, [form for form in forms if "{}" in form] if forms else forms)
    folder.skip(name for name in folder.names if _BASE.fullmatch(name))
    modules = {name: _module(folder, name, parts, scales) for name, parts in groups.items()}
    return RoutedAdapter(modules, system=NAME, columns=COLUMNS)


def _scale(folder: AdapterFolder, key: str) -> float:
    value = folder.setting(key, _SETTINGS[key])
    return number(value, f"{key} in {SIDECAR}", -MAX_ALPHA, MAX_ALPHA)


def _module(
    folder: AdapterFolder, name: str, parts: dict[str, str], scales: list[float]
) -> RoutedModule:
    a, b = [], []
    width, out = None, None
    for letter, scale in zip("VL", scales, strict=True):
        a_RK = take_shaped(folder, part(parts, f"{letter}_Slora_A", name), None, width)
        b_NR = take_shaped(folder, part(parts, f"{letter}_Slora_B", name), out, len(a_RK))
        width, out = a_RK.shape[1], b_NR.shape[0]
        a.append(a_RK)
        b.append(scale * b_NR)
    blocks = [len(a_RK) for a_RK in a]
    return RoutedModule(
        torch.cat(a), torch.cat(b, dim=1), make_gate({"source": "position", "blocks": blocks}, name)
    )


READER = Reader(
    name=NAME,
    title="MM-LoRA (Arcana)",
    url="https://github.com/syp2ysy/Arcana",
    files="model.safetensors with <module>.{V,L}_Slora_{A,B}.weight, beside them the base model's"
    " tensors, which are not read, or none, routing.json with scaling_visual and scaling_language;"
    " no adapter_config.json",
    peft_types=(),
    detect=detect,
    read=read,
    paper="Improving Multi-modal Large Language Model through Boosting Vision Capabilities,"
    " https://arxiv.org/abs/2410.13733",
    summary="Tokens of images go through one LoRA, all others through another; which is which comes"
    " from the positions of the multimodal inputs, or of `modality_spans` in the request.",
    request="nothing, with multimodal inputs; `modality_spans`, where ids or embeddings stand for"
    " them",
    formula="y_t = W x_t + s_V B_V A_V x_t  at tokens of an image\n"
    "y_t = W x_t + s_L B_L A_L x_t  at all others, and all generated ones",
    settings=_SETTINGS,
    traps=(
        "Both factors are the constant 2 in the authors' code, whatever alpha and r are.",
        "The authors take positions 35 to 674 of every prompt for the image. Here they are those"
        " that the model's processor says hold image tokens.",
        "QLadder, the ladder of queries beside the vision tower, belongs to the base model, and is"
        " no adapter.",
    ),
)
