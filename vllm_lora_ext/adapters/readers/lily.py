"""Lily (PEFT): known, and refused with the reason."""

from __future__ import annotations

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.errors import AdapterError

REASON = (
    "its router's weights are averaged over every token of the batch, later ones and other"
    " requests' included: an answer would depend on what else is served at the moment, and there"
    " is no KV cache to which it could be faithful"
)


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "LILY"


def read(folder: AdapterFolder) -> RoutedAdapter:
    raise AdapterError(
        "unsupported_feature", f"Lily is not served: {REASON}", seen="LILY",
        fix="train the experts with a router per token (LoRAMoE, HydraLoRA, MoLA)",
    )  # fmt: skip


READER = Reader(
    name="lily",
    title="Lily (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type LILY, stride_A, num_B, scaling), "
    "adapter_model.safetensors with <module>.lily_A.weight, .lily_B.weight, .lily_router.weight",
    peft_types=("LILY",),
    detect=detect,
    read=read,
    paper="Low-Rank Interconnected Adaptation across Layers, https://arxiv.org/abs/2407.09946",
    summary="A shared by neighbouring layers, a bank of B shared by all layers, and a router on"
    " A x whose softmax is averaged over the whole batch.",
    formula="y = W x + c · B(p) A x, B(p) = sum_e p_e B_e, p = mean over all tokens of"
    " softmax(R A x)",
    traps=("Changing the last token of a prompt changes the logits of the first.",),
    refused=REASON,
)
