"""What a front end may call of the engine core: these become methods of it (`core`)."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCoreProc

from vllm_lora_ext.adapters.memory import MemorySource
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.core_adapters import CoreAdapters, adapters_of

ADD = "lora_ext_add"
"""Method of the core: what `add_lora` does, and the answer says what was evicted."""

STATE = "lora_ext_state"
"""Method of the core: what it holds, and what its workers count."""

ROLL_BACK = "lora_ext_roll_back"
"""Method of the core: new requests get an older version again."""

TAKE_BACK = "lora_ext_take_back"
"""Method of the core: a load or a rollback that another core refused is undone."""

OURS = "lora_ext"
"""Names of methods of core and workers that are the plugin's begin so."""


def add(self: Any, request: Any, source: Any = None, expected: str | None = None) -> Any:
    """As `CoreAdapters.add`; from a core in a process of its own, whose loop must not wait for a
    disk, a future of it.

    Args:
        request: a `LoRARequest`, or what the wire made of it.
        source: `[tensors, config, settings]` of one that is handed over as tensors.
    """
    adapters, lora = _asked(self, request)
    given = source and MemorySource(*source)
    if isinstance(self, EngineCoreProc) and adapters.ledger.reads(lora, given):
        try:
            adapters.ledger.check_expected(lora, expected)  # before anything is read for it
        except AdapterError as error:
            return {"error": str(error)}
        return adapters.loading.begin(lora, given, expected)
    return adapters.add(lora, given, None, expected)


def roll_back(self: Any, request: Any, version: str, expected: str | None = None) -> Any:
    """As `CoreAdapters.roll_back`."""
    adapters, lora = _asked(self, request)
    return adapters.roll_back(lora, version, expected)


def take_back(self: Any, request: Any, version: str, before: str | None) -> None:
    """As `Ledger.take_back`."""
    adapters, lora = _asked(self, request)
    adapters.ledger.take_back(lora.lora_int_id, version, before)


def state(self: Any, count: bool) -> Any:
    """As `CoreAdapters.state`."""
    adapters = adapters_of(self)
    assert adapters is not None, "the front end asks only where LoRA is on"
    return adapters.state(count)


def gate(self: Any, request: Any, version: str, ids: list[int]) -> Any:
    """The gate of an instruction (`gate_pass.GATE`); from a core in a process of its own a future
    of it, else the engine's steps are taken here until it is known.

    Args:
        request: the template's `LoRARequest`, or what the wire made of it; version: its content.
    """
    adapters, lora = _asked(self, request)
    try:
        answer = adapters.gate(lora, version, ids)
    except AdapterError as error:
        return {"error": str(error)}
    if isinstance(self, EngineCoreProc):
        return answer
    while not answer.done():
        adapters.step_aside()
    return answer.result()


def _asked(core: Any, request: Any) -> tuple[CoreAdapters, LoRARequest]:
    """Of a call by a front end: a core's adapters, and the `LoRARequest` that may have come over
    the wire."""
    adapters = adapters_of(core)
    assert adapters is not None, "the front end asks only where LoRA is on"
    if not isinstance(request, LoRARequest):
        request = msgspec.convert(request, LoRARequest)
    return adapters, request
