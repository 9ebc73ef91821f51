"""Which backend runs where. A backend is imported when it is chosen, and not before."""

from __future__ import annotations

from importlib.util import find_spec

from vllm_lora_ext.kernels.gated_lora.backends import eager
from vllm_lora_ext.kernels.gated_lora.backends.base import Backend
from vllm_lora_ext.kernels.gated_lora.backends.native import backend as native


def best(device_type: str) -> Backend:
    """Triton on a GPU that has it, else `without_triton`."""
    if device_type != "cpu" and find_spec("triton") is not None:
        return triton()
    return without_triton(device_type)


def without_triton(device_type: str) -> Backend:
    """C++ on a CPU with a compiler, else PyTorch."""
    return native if device_type == "cpu" and native.install() else eager


def triton() -> Backend:
    """The Triton kernels, on a GPU or in Triton's interpreter."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton import backend

    return backend
