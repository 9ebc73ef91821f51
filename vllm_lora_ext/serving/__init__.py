"""Merged adapters by name in a request. Knows merging and adapters, no vLLM."""

from vllm_lora_ext.serving.lorax import from_lorax
from vllm_lora_ext.serving.mix_name import Mix, is_mix_name, parse
from vllm_lora_ext.serving.service import Host, Mixes

__all__ = ["Host", "Mix", "Mixes", "from_lorax", "is_mix_name", "parse"]
