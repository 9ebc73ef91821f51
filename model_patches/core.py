"""The engine core loads adapters before it schedules requests for them, and keeps the ledger.

Targets: `EngineCore.{preprocess_add_request, add_request, step, step_with_batch_queue, add_lora,
remove_lora, list_loras, pin_lora, collective_rpc}`, `EngineCoreProc.has_work`,
`Scheduler._handle_blocked_waiting_request`, and `_gen_lora_extra_hash_keys` and
`_gen_mm_extra_hash_keys`, parts of a block's key in the prefix cache. Whatever front end asks
(several API servers, a client that talks to the core directly), a step meets only adapters that
every worker holds, and a request whose adapter cannot be had ends alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import vllm.v1.core.kv_cache_utils as kv_cache_utils
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore, EngineCoreProc

from vllm_lora_ext.model_patches import core_calls
from vllm_lora_ext.model_patches.block_keys import BlockKeys
from vllm_lora_ext.model_patches.core_adapters import KEY, adapters_of
from vllm_lora_ext.model_patches.gate_pass import GATE


def _patch_core() -> None:
    preprocess, add_request = EngineCore.preprocess_add_request, EngineCore.add_request
    add_lora, remove_lora = EngineCore.add_lora, EngineCore.remove_lora
    list_loras, pin_lora = EngineCore.list_loras, EngineCore.pin_lora
    collective_rpc = EngineCore.collective_rpc

    @functools.wraps(preprocess)
    def new_preprocess(self: Any, request: Any) -> Any:
        adapters_of(self)
        return preprocess(self, request)

    @functools.wraps(add_request)
    def new_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        adapters = adapters_of(self)
        if adapters is None or request.lora_request is None or adapters.admit(request):
            add_request(self, request, *args, **kwargs)

    @functools.wraps(add_lora)
    def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        adapters = adapters_of(self)
        if adapters is None:
            return add_lora(self, lora_request)
        adapters.ledger.add(lora_request)
        return True

    @functools.wraps(remove_lora)
    def new_remove_lora(self: Any, lora_id: int) -> bool:
        adapters = adapters_of(self)
        return adapters.ledger.remove(lora_id) if adapters else remove_lora(self, lora_id)

    @functools.wraps(list_loras)
    def new_list_loras(self: Any) -> set[int]:
        adapters = adapters_of(self)
        return adapters.ledger.ids() if adapters else list_loras(self)

    @functools.wraps(pin_lora)
    def new_pin_lora(self: Any, lora_id: int) -> bool:
        adapters = adapters_of(self)
        return adapters.ledger.pin(lora_id) if adapters else pin_lora(self, lora_id)

    @functools.wraps(collective_rpc)
    def new_collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = self.__dict__.get("_lora_ext")
        if adapters is not None and not str(method).startswith(core_calls.OURS):
            adapters.ledger.doubt()
        return collective_rpc(self, method, *args, **kwargs)

    EngineCore.preprocess_add_request, EngineCore.add_request = new_preprocess, new_add_request
    EngineCore.add_lora, EngineCore.remove_lora = new_add_lora, new_remove_lora
    EngineCore.list_loras, EngineCore.pin_lora = new_list_loras, new_pin_lora
    EngineCore.collective_rpc = new_collective_rpc
    setattr(EngineCore, core_calls.ADD, core_calls.add)
    setattr(EngineCore, core_calls.ROLL_BACK, core_calls.roll_back)
    setattr(EngineCore, core_calls.TAKE_BACK, core_calls.take_back)
    setattr(EngineCore, core_calls.STATE, core_calls.state)
    setattr(EngineCore, GATE, core_calls.gate)
    has_work = EngineCoreProc.has_work

    @functools.wraps(has_work)
    def new_has_work(self: Any) -> bool:
        adapters = self.__dict__.get("_lora_ext")
        pending = adapters is not None and (adapters.loading.pending or adapters.gates.pending)
        return has_work(self) or pending

    EngineCoreProc.has_work = new_has_work
    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, _stepping(getattr(EngineCore, name)))


def _stepping(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(step)
    def new_step(self: Any) -> Any:
        adapters = self.__dict__.get("_lora_ext")
        return step(self) if adapters is None else adapters.step(functools.partial(step, self))

    return new_step


def _patch_scheduler() -> None:
    ready = Scheduler._handle_blocked_waiting_request

    @functools.wraps(ready)
    def new_ready(self: Any, request: Any) -> bool:
        if not ready(self, request):
            return False
        adapters = self.__dict__.get("_lora_ext")
        if adapters is None or request.lora_request is None:
            return True
        return adapters.turns.admits(request, adapters.ledger.pinned)

    Scheduler._handle_blocked_waiting_request = new_ready


def _patch_keys() -> None:
    of_lora = kv_cache_utils._gen_lora_extra_hash_keys
    of_block = kv_cache_utils._gen_mm_extra_hash_keys  # the first that is told which block it is

    @functools.wraps(of_lora)
    def new_of_lora(request: Any) -> list[tuple[str, ...]]:
        key = getattr(request, KEY, None)
        if key is None:
            return of_lora(request)
        return [("lora", key)] if isinstance(key, str) else []

    @functools.wraps(of_block)
    def new_of_block(request: Any, start: int, stop: int, at: int) -> tuple[list[Any], int]:
        keys, at = of_block(request, start, stop, at)
        key = getattr(request, KEY, None)
        if isinstance(key, BlockKeys):
            keys = [*key.entries(start, stop), *keys]
        return keys, at

    kv_cache_utils._gen_lora_extra_hash_keys = new_of_lora
    kv_cache_utils._gen_mm_extra_hash_keys = new_of_block


def apply() -> None:
    """Wraps all three."""
    _patch_core()
    _patch_scheduler()
    _patch_keys()
