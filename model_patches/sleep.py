"""vLLM's sleep: what the LoRA layers keep on the device is there again after a wake-up.

An engine that may sleep loads its model, and with it makes the LoRA manager, in a pool of memory
whose tag says what becomes of it. That of weights is copied to the host on level 1 and thrown away
on level 2, where a trainer then writes new ones; nobody would write the slots again, nor the tables
that kernels and captured graphs read at fixed addresses, while the host still knows them as filled.
So they are allocated under the tag `runtime`, which vLLM keeps on every level for what it holds of
this kind itself. Routers that an adapter needs later lie in no pool, and stay where they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import vllm.device_allocator as device_allocator

KEPT = "runtime"  # vLLM's tag


def kept_asleep(vllm_config: Any) -> AbstractContextManager[None]:
    """Device memory that is allocated inside keeps its content over a sleep of any level."""
    pooled = vllm_config.model_config.enable_cumem_allocator
    if vllm_config.device_config.device_type != "cuda" or not pooled:
        return nullcontext()
    return device_allocator.get_mem_allocator_instance().use_memory_pool(tag=KEPT)


def apply() -> None:
    """Nothing at start: `worker` makes the LoRA manager inside `kept_asleep`."""
