"""An adapter that fails, fails its own request, before the request reaches the engine.

Targets: `LLMEngine.{add_request, add_lora, remove_lora, pin_lora}` and the same of `AsyncLLM`; both
get `add_adapter` for adapters that are tensors. The first request that names an adapter has it
loaded and checked by `add_lora`, whose error comes back to the caller as an `AdapterError`. This is
a shortcut for early errors: the engine core checks every request again (`core`), for it alone knows
what was evicted meanwhile.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_lora_ext.adapters.memory import MemorySource
from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.core import ADD
from vllm_lora_ext.model_patches.ledger import MEMORY_IDS
from vllm_lora_ext.model_patches.refused import RefusedRequest

_TRIES = 8


class Admitted:
    """Adapters that the core holds, as far as this front end knows."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, str]] = {}  # id → (name, path)
        self._versions: dict[int, str] = {}

    @classmethod
    def of(cls, engine: Any) -> Admitted:
        """Those of an `LLMEngine` or `AsyncLLM`."""
        if not hasattr(engine, "_lora_ext_admitted"):
            engine._lora_ext_admitted = cls()
        return engine._lora_ext_admitted

    def needs_load(self, request: LoRARequest) -> bool:
        known = self._known.get(request.lora_int_id)
        return request.load_inplace or known != (request.lora_name, request.lora_path)

    def loaded(self, request: LoRARequest, reply: dict[str, Any]) -> None:
        """Takes the core's answer. Raises AdapterError when it was no."""
        if "error" in reply:
            error = AdapterError.parse(reply["error"])
            assert error is not None
            raise error
        for lora_id in reply["evicted"]:
            self.remove(lora_id)
        self._known[request.lora_int_id] = (request.lora_name, request.lora_path)
        self._versions[request.lora_int_id] = reply["version"]

    def remove(self, lora_id: int) -> None:
        self._known.pop(lora_id, None)

    def version(self, lora_id: int) -> str:
        """The digest of what was loaded last under an id; empty for one that never was."""
        return self._versions.get(lora_id, "")


class _Arguments:
    """Finds and replaces the adapter in the arguments of `add_request`, however it was passed."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        names = list(inspect.signature(stock).parameters)[1:]  # without self
        self._lora, self._prompt = names.index("lora_request"), names.index("prompt")

    def lora(self, args: Any, kwargs: Any) -> LoRARequest | None:
        own: LoRARequest | None = self._get("lora_request", self._lora, args, kwargs)
        if own is not None:
            return own
        return getattr(self._get("prompt", self._prompt, args, kwargs), "lora_request", None)

    def once(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments after `load_inplace` was done."""
        own = self._get("lora_request", self._lora, args, kwargs)
        if own is None:
            prompt = self._get("prompt", self._prompt, args, kwargs)
            prompt.lora_request = msgspec.structs.replace(prompt.lora_request, load_inplace=False)
            return args, kwargs
        done = msgspec.structs.replace(own, load_inplace=False)
        if "lora_request" in kwargs:
            return args, {**kwargs, "lora_request": done}
        return (*args[: self._lora], done, *args[self._lora + 1 :]), kwargs

    @staticmethod
    def _get(name: str, position: int, args: Any, kwargs: Any) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[position] if position < len(args) else None


def _check_on(engine: Any) -> None:
    if engine.vllm_config.lora_config is None:
        raise AdapterError(
            "bad_settings", "this engine serves no adapters", fix="start it with LoRA enabled"
        )


def _requests(name: str) -> list[LoRARequest]:
    """The same name is the same id, on every front end; a few more for names that meet in one."""
    start = int.from_bytes(sha256(name.encode()).digest()[:4], "little")
    ids = [MEMORY_IDS + (start + i) % (DERIVED_IDS - MEMORY_IDS) for i in range(_TRIES)]
    return [LoRARequest(name, number, f"memory:{name}", load_inplace=True) for number in ids]


def _next(error: AdapterError, request: LoRARequest, requests: list[LoRARequest]) -> None:
    if error.code != "id_in_use" or request is requests[-1]:
        raise error


def _typed(error: Exception) -> Exception:
    return AdapterError.parse(str(error)) or error


def _source(tensors: Any, config: Any, settings: Any) -> list[Any]:
    source = MemorySource.of(tensors, config, settings)
    return [source.tensors, source.config, source.settings]


def _patch_sync(cls: type[Any]) -> None:
    add_request, add_lora = cls.add_request, cls.add_lora
    remove_lora, pin_lora = cls.remove_lora, cls.pin_lora
    arguments = _Arguments(add_request)

    def ask(self: Any, lora: LoRARequest, source: Any = None) -> None:
        client = self.engine_core
        core = getattr(client, "engine_core", None)  # an engine in this process
        call = functools.partial(client.call_utility, ADD) if core is None else getattr(core, ADD)
        Admitted.of(self).loaded(lora, call(lora, source))

    @functools.wraps(add_lora)
    def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        if self.vllm_config.lora_config is None:
            return add_lora(self, lora_request)
        ask(self, lora_request)
        return True

    @functools.wraps(add_request)
    def new_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora = arguments.lora(args, kwargs)
        if lora is not None and self.vllm_config.lora_config is not None:
            if Admitted.of(self).needs_load(lora):
                ask(self, lora)
            if lora.load_inplace:
                args, kwargs = arguments.once(args, kwargs)
        return add_request(self, *args, **kwargs)

    @functools.wraps(remove_lora)
    def new_remove_lora(self: Any, lora_id: int) -> bool:
        Admitted.of(self).remove(lora_id)
        return remove_lora(self, lora_id)

    @functools.wraps(pin_lora)
    def new_pin_lora(self: Any, lora_id: int) -> bool:
        try:
            return pin_lora(self, lora_id)
        except Exception as error:
            raise _typed(error) from error

    def add_adapter(
        self: Any, name: str, tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None, settings: Mapping[str, Any] | None = None,
    ) -> LoRARequest:  # fmt: skip
        """Load an adapter that is tensors; by a name that was added before, it replaces that one.

        Args:
            name: what the answer is named by; its id follows from it.
            tensors: as the adapter's safetensors file would name them.
            config: what `adapter_config.json` would hold; None for a format without one.
            settings: what `routing.json` would hold, if anything.
        Returns:
            What requests are sent with. The engine keeps the adapter until `remove_lora`.
        Raises:
            AdapterError: what a folder of these files would raise.
        """
        _check_on(self)
        source, requests = _source(tensors, config, settings), _requests(name)
        for request in requests:
            try:
                ask(self, request, source)
                break
            except AdapterError as error:
                _next(error, request, requests)
        return msgspec.structs.replace(request, load_inplace=False)

    cls.add_request, cls.add_lora = new_add_request, new_add_lora
    cls.remove_lora, cls.pin_lora = new_remove_lora, new_pin_lora
    cls.add_adapter = add_adapter


def _patch_async(cls: type[Any]) -> None:
    add_request, add_lora = cls.add_request, cls.add_lora
    remove_lora, pin_lora = cls.remove_lora, cls.pin_lora
    arguments = _Arguments(add_request)

    async def ask(self: Any, lora: LoRARequest, source: Any = None) -> None:
        reply = await self.engine_core.call_utility_async(ADD, lora, source)
        Admitted.of(self).loaded(lora, reply)

    @functools.wraps(add_lora)
    async def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        if self.vllm_config.lora_config is None:
            return await add_lora(self, lora_request)
        await ask(self, lora_request)
        return True

    @functools.wraps(add_request)
    async def new_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora = arguments.lora(args, kwargs)
        if lora is not None and self.vllm_config.lora_config is not None:
            try:
                if Admitted.of(self).needs_load(lora):
                    await ask(self, lora)
            except AdapterError as error:
                raise RefusedRequest(error) from None
            if lora.load_inplace:
                args, kwargs = arguments.once(args, kwargs)
        return await add_request(self, *args, **kwargs)

    @functools.wraps(remove_lora)
    async def new_remove_lora(self: Any, lora_id: int) -> bool:
        Admitted.of(self).remove(lora_id)
        return await remove_lora(self, lora_id)

    @functools.wraps(pin_lora)
    async def new_pin_lora(self: Any, lora_id: int) -> bool:
        try:
            return await pin_lora(self, lora_id)
        except Exception as error:
            raise _typed(error) from error

    async def add_adapter(
        self: Any, name: str, tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None, settings: Mapping[str, Any] | None = None,
    ) -> LoRARequest:  # fmt: skip
        """As `LLMEngine.add_adapter`."""
        _check_on(self)
        source, requests = _source(tensors, config, settings), _requests(name)
        for request in requests:
            try:
                await ask(self, request, source)
                break
            except AdapterError as error:
                _next(error, request, requests)
        return msgspec.structs.replace(request, load_inplace=False)

    cls.add_request, cls.add_lora = new_add_request, new_add_lora
    cls.remove_lora, cls.pin_lora = new_remove_lora, new_pin_lora
    cls.add_adapter = add_adapter


def apply() -> None:
    """Wraps both engines' front ends."""
    _patch_sync(LLMEngine)
    _patch_async(AsyncLLM)
