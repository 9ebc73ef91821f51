"""vLLM's products on a CPU: one thread at a time.

Target: `execute_model`, `sample_tokens` and `execute_dummy_batch` of `Worker`. A linear layer's
product there is a handle of oneDNN's, which keeps where the call at hand reads and writes, and all
handles share their scratch memory: two threads that call them at once write over each other's.
Steps are one of them; what is computed of base weights beside the steps (`dora`) is the other, in
pieces that a step waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from vllm_lora_ext.model_patches.rows import wrap_once

alone = threading.RLock()
"""To be held by whoever calls a base layer's product. Of the process: the handles are."""


def guard_steps() -> None:
    """From now on the steps of this process hold `alone`. Where nobody else does, that costs them
    less than a microsecond."""
    # Here, not above: the front end's process has no worker, and this import is a large one.
    from vllm.v1.worker.gpu_worker import Worker

    wrap_once(Worker, execute_model=_alone, sample_tokens=_alone, execute_dummy_batch=_alone)


def _alone(stock: Callable[..., Any]) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        with alone:
            return stock(*args, **kwargs)

    return step


def apply() -> None:
    """Nothing at start: the first LoRA manager on a CPU calls `guard_steps`."""
