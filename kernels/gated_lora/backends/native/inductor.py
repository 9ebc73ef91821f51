"""How graphs that Inductor compiled call the in-place ops on a CPU: only if a row has an adapter.

Calling an op costs Python more than a microsecond, also where it has nothing to do, and a decoder
layer has five. Inductor lets an op write the line of its call itself:

    torch.ops.vllm_lora_ext.active and torch.ops.vllm_lora_ext.gated_lora_.default(buf3, buf8, 2)

Not on a GPU, where a captured graph would freeze the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("vllm.lora_ext")

_namespace: Any = torch.ops.vllm_lora_ext
_running: set[int] = set()


def set_active(step: int, active: bool) -> None:
    """Graphs call the ops while any step map of this process has an adapter.

    Args:
        step: the map's number.
    """
    _running.add(step) if active else _running.discard(step)
    _namespace.active = bool(_running)


def call_when_active(op: str) -> None:
    """From now on compiled code asks first; `op` has no result. Once, before anything compiles."""
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import (
            CUSTOM_EXTERN_KERNEL_CODEGEN,
            CustomCodegen,
        )
    except ImportError:  # a PyTorch without this registry: the op is called and does nothing
        logger.info("vllm-lora-ext: this PyTorch calls the ops in every step")
        return
    CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.vllm_lora_ext.{op}.default"] = CustomCodegen(
        python=_write
    )


def _write(node: Any, writeline: Callable[[str], None]) -> None:
    arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
    call = f"{node.python_kernel_name}({arguments})"
    on_cpu = node.get_device().type == "cpu"
    writeline(f"torch.ops.vllm_lora_ext.active and {call}" if on_cpu else call)


set_active(0, False)
