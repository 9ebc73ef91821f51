"""Serve mixtures of LoRA experts with stock vLLM."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_lora_ext.errors import AdapterError

__version__ = "0.1.0"
__all__ = ["AdapterError", "RewardModel", "__version__"]

_LATER = {"RewardModel": "vllm_lora_ext.reward"}  # what needs torch is imported when it is used


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
