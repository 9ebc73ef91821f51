"""Adapters: what one is, how a folder becomes one, and the checks in between. Knows no vLLM."""

from vllm_lora_ext.adapters.checks import check_adapter, check_fits
from vllm_lora_ext.adapters.folder import AdapterFolder, Limits, resolve_inside
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import FORMATS, Reader, load_adapter

__all__ = [
    "FORMATS", "AdapterFolder", "Limits", "Reader", "RoutedAdapter", "RoutedModule",
    "check_adapter", "check_fits", "load_adapter", "resolve_inside", "write_native",
]  # fmt: skip
