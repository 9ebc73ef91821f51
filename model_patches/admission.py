"""An adapter that fails, fails its own request, before the request reaches the engine.

Targets: `LLMEngine.{add_request, add_lora, remove_lora}` and the same of `AsyncLLM`. Stock loads an
adapter in the middle of a step: an error there ends the engine, or leaves a slot that answers
from the base model. Here the first request that names an adapter has it loaded and checked by
`add_lora`, whose error comes back to the caller as an `AdapterError`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_lora_ext.errors import AdapterError


class _Admitted:
    """Adapters that the engine holds: id → (name, path)."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, str]] = {}

    @classmethod
    def of(cls, engine: Any) -> _Admitted:
        if not hasattr(engine, "_lora_ext_admitted"):
            engine._lora_ext_admitted = cls()
        return engine._lora_ext_admitted

    def needs_load(self, request: LoRARequest | None) -> bool:
        if request is None:
            return False
        known = self._known.get(request.lora_int_id)
        if known is None or request.load_inplace:
            return True
        if known != (request.lora_name, request.lora_path):
            raise AdapterError(
                "id_in_use",
                f"lora_int_id {request.lora_int_id} already belongs to another adapter",
                seen=f"{request.lora_name} at {request.lora_path}",
                limit=f"{known[0]} at {known[1]}",
                fix="give every adapter its own id, or set load_inplace",
            )
        return False

    def add(self, request: LoRARequest) -> None:
        self._known[request.lora_int_id] = (request.lora_name, request.lora_path)

    def remove(self, lora_id: int) -> None:
        self._known.pop(lora_id, None)


def _typed(error: Exception) -> Exception:
    return AdapterError.parse(str(error)) or error


@functools.cache
def _position(stock: Callable[..., Any], name: str) -> int:
    return list(inspect.signature(stock).parameters).index(name)


def _argument(stock: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    position = _position(stock, name)
    return args[position] if position < len(args) else None


def _lora_of(stock: Callable[..., Any], args: Any, kwargs: Any) -> LoRARequest | None:
    """The adapter of an `add_request` call, whichever way it was passed."""
    own: LoRARequest | None = _argument(stock, "lora_request", args, kwargs)
    if own is not None:
        return own
    return getattr(_argument(stock, "prompt", args, kwargs), "lora_request", None)


def _patch_sync(cls: type[Any]) -> None:
    add_request, add_lora, remove_lora = cls.add_request, cls.add_lora, cls.remove_lora

    @functools.wraps(add_lora)
    def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        try:
            done = add_lora(self, lora_request)
        except Exception as error:
            raise _typed(error) from error
        _Admitted.of(self).add(lora_request)
        return done

    @functools.wraps(add_request)
    def new_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora = _lora_of(add_request, (self, *args), kwargs)
        if self.vllm_config.lora_config is not None and _Admitted.of(self).needs_load(lora):
            self.add_lora(lora)
        return add_request(self, *args, **kwargs)

    @functools.wraps(remove_lora)
    def new_remove_lora(self: Any, lora_id: int) -> bool:
        _Admitted.of(self).remove(lora_id)
        return remove_lora(self, lora_id)

    cls.add_request, cls.add_lora, cls.remove_lora = new_add_request, new_add_lora, new_remove_lora


def _patch_async(cls: type[Any]) -> None:
    add_request, add_lora, remove_lora = cls.add_request, cls.add_lora, cls.remove_lora

    @functools.wraps(add_lora)
    async def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        try:
            done = await add_lora(self, lora_request)
        except Exception as error:
            raise _typed(error) from error
        _Admitted.of(self).add(lora_request)
        return done

    @functools.wraps(add_request)
    async def new_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora = _lora_of(add_request, (self, *args), kwargs)
        if self.vllm_config.lora_config is not None and _Admitted.of(self).needs_load(lora):
            await self.add_lora(lora)
        return await add_request(self, *args, **kwargs)

    @functools.wraps(remove_lora)
    async def new_remove_lora(self: Any, lora_id: int) -> bool:
        _Admitted.of(self).remove(lora_id)
        return await remove_lora(self, lora_id)

    cls.add_request, cls.add_lora, cls.remove_lora = new_add_request, new_add_lora, new_remove_lora


def apply() -> None:
    """Wraps both engines' front ends."""
    _patch_sync(LLMEngine)
    _patch_async(AsyncLLM)
