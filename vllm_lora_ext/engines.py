"""Offline engines for tools: vLLM's own `LLM`, its errors typed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_lora_ext.errors import AdapterError


def log_elsewhere() -> None:
    """For commands, before vLLM is imported: it logs to stdout, where the result belongs."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def start_engine(options: Mapping[str, Any]) -> Any:
    """vLLM's `LLM`.

    Raises:
        AdapterError: `engine_failed`, or what the plugin has to say about the options.
    """
    # On a CPU the default is a share of the whole memory, which tools need little of.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    try:
        return LLM(**options)
    except Exception as error:  # vLLM raises many kinds, and has logged the cause
        if (known := AdapterError.parse(str(error))) is not None:
            raise known from error
        raise AdapterError(
            "engine_failed", f"the vLLM engine does not start: {str(error)[:300]}",
            fix="look at vLLM's log above; options go into --engine-args",
        ) from error  # fmt: skip


def stop_engine(llm: Any) -> None:
    """Ends its processes now, not at garbage collection."""
    llm.llm_engine.engine_core.shutdown()
