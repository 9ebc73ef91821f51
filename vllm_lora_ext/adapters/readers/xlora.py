"""X-LoRA (PEFT, and github.com/EricLBuehler/xlora): known, and refused with the reason."""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.errors import AdapterError

_ORIGINAL = re.compile(r"(inner\.\d+|last)\.(weight|bias)")
REASON = (
    "its gate is computed from the last hidden state of a first, complete forward of the base"
    " model over the same tokens: every token needs two forwards one after the other and two KV"
    " caches, which one request of the engine does not have; the cheap stand-ins were measured,"
    " and none is near the adapter (docs/systems/xlora_study.md)"
)


def detect(folder: AdapterFolder) -> bool:
    if folder.has_config:
        return folder.config.get("peft_type") == "XLORA"
    return bool(folder.names) and all(map(_ORIGINAL.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    raise AdapterError(
        "unsupported_feature", f"X-LoRA is not served: {REASON}",
        seen=folder.config.get("peft_type", "xlora_classifier.safetensors"),
        fix="serve its experts as single adapters, or bundle them with Arrow or a trained router",
    )  # fmt: skip


READER = Reader(
    name="xlora",
    title="X-LoRA",
    url="https://github.com/EricLBuehler/xlora",
    files="adapter_config.json (peft_type XLORA) with the experts in subfolders 0, 1, ..., or "
    "xlora_config.json and xlora_classifier.safetensors",
    peft_types=("XLORA",),
    detect=detect,
    read=read,
    paper="X-LoRA: Mixture of Low-Rank Adapter Experts, https://arxiv.org/abs/2402.07148",
    summary="A classifier over the base model's last hidden state of the same token weights the"
    " experts, for the whole model or per layer.",
    formula="y = W x + c · sum_e g_e s_e B_e A_e x, g = softmax(MLP(h) / T), h the token's last"
    " hidden state in a first forward without the adapters",
    traps=(
        "PEFT 0.21.2 names the experts 0, 1, ... and drops the classifier's layers of the same"
        " numbers when it saves: a saved classifier of depth 1 is empty, of depth 2 lacks layer 0.",
        "PEFT and the original both refuse a KV cache. By causality old tokens' gates never"
        " change, so two caches would be exact.",
        "top_k_lora masks the weights without renormalising them.",
    ),
    refused=REASON,
)
