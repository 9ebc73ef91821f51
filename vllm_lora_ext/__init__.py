"""Serve mixtures of LoRA experts with stock vLLM."""

from vllm_lora_ext.errors import AdapterError

__version__ = "0.1.0"
__all__ = ["AdapterError", "__version__"]
