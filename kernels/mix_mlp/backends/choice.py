"""Which backend a block has. Triton's is imported when it is chosen, and not before."""

from __future__ import annotations

from vllm_lora_ext.kernels.gated_lora.backends.base import Backend
from vllm_lora_ext.kernels.mix_mlp.backends import eager
from vllm_lora_ext.kernels.mix_mlp.backends.base import BlockBackend


def beside(linears: Backend) -> BlockBackend:
    """The one that goes with the backend of a block's linears: where their launches do not ask the
    host for the step's slots, neither may the block's."""
    if not linears.on_device:
        return eager
    from vllm_lora_ext.kernels.mix_mlp.backends.triton import backend

    return backend
