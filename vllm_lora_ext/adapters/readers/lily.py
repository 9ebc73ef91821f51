"""Lily (PEFT): known, and refused with the reason."""

from __future__ import annotations

from vllm_lora_ext.adapters.readers.base import Reader, of_type

READER = Reader(
    name="lily",
    title="Lily (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type LILY, stride_A, num_B, scaling), "
    "adapter_model.safetensors with <module>.lily_A.weight, .lily_B.weight, .lily_router.weight",
    peft_types=("LILY",),
    detect=of_type("LILY"),
    paper="Low-Rank Interconnected Adaptation across Layers, https://arxiv.org/abs/2407.09946",
    summary="A shared by neighbouring layers, a bank of B shared by all layers, and a router on"
    " A x whose softmax is averaged over the whole batch.",
    formula="y = W x + c · B(p) A x, B(p) = sum_e p_e B_e, p = mean over all tokens of"
    " softmax(R A x)",
    traps=("Changing the last token of a prompt changes the logits of the first.",),
    refused="its router's weights are averaged over every token of the batch, later ones and other"
    " requests' included: an answer would depend on what else is served at the moment, and there"
    " is no KV cache to which it could be faithful",
)
