"""The gate table and its plain reference. Knows no vLLM and no files."""

from vllm_lora_ext.routing.attention import attention_reference
from vllm_lora_ext.routing.norm import InputNorm
from vllm_lora_ext.routing.reference import (
    GatedSlice,
    delta_reference,
    gate_reference,
    logits_reference,
)
from vllm_lora_ext.routing.rescale import Rescale
from vllm_lora_ext.routing.spec import GateSpec, GateSpecError

__all__ = [
    "GateSpec",
    "GateSpecError",
    "GatedSlice",
    "InputNorm",
    "Rescale",
    "attention_reference",
    "delta_reference",
    "gate_reference",
    "logits_reference",
]
