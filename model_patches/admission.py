"""An adapter that fails, fails its own request, before the request reaches the engine.

Targets: `LLMEngine.{add_request, add_lora, remove_lora, pin_lora, collective_rpc}` and the same of
`AsyncLLM`; both get `add_adapter` for adapters that are tensors, `roll_back_adapter`,
`adapter_version`. The first request that names an adapter has it loaded and checked by `add_lora`,
whose error comes back to the caller as an `AdapterError`. This is a shortcut for early errors: the
engine core checks every request again (`core`), for it alone knows what was evicted meanwhile.
Trainers hand adapters to the workers themselves, by `collective_rpc`: what is held is asked for
anew afterwards. Here also a request's own words (`request_says`) become what it is sent with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_lora_ext.adapters.memory import MemorySource
from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.conditions.said import FIELD
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import metrics
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.core_calls import OURS
from vllm_lora_ext.model_patches.driving import run, run_async
from vllm_lora_ext.model_patches.held import MEMORY_IDS, memory_path
from vllm_lora_ext.model_patches.refused import RefusedRequest
from vllm_lora_ext.model_patches.request_says import TRIES, no_adapters, resolve, said_by
from vllm_lora_ext.model_patches.request_settled import (  # fmt: skip
    Settled,
    Spoken,
    carrying,
    extras_of,
)
from vllm_lora_ext.model_patches.request_steps import Steps, load_first, roll_back


class _Arguments:
    """Finds and replaces the adapter and the parameters in the arguments of `add_request`, however
    they were passed; a prompt that is a request of its own holds both."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        names = list(inspect.signature(stock).parameters)[1:]  # without self
        self._at = {name: names.index(name) for name in ("lora_request", "prompt", "params")}

    def get(self, args: Any, kwargs: Any) -> tuple[LoRARequest | None, Any]:
        """The adapter and the parameters."""
        lora, params = (self._get(name, args, kwargs) for name in ("lora_request", "params"))
        prompt = self._get("prompt", args, kwargs)
        if hasattr(prompt, "lora_request"):
            return lora or prompt.lora_request, getattr(prompt, _place(prompt), None)
        return lora, params

    def put(self, lora: LoRARequest | None, params: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with others in their places."""
        prompt = self._get("prompt", args, kwargs)
        if hasattr(prompt, "lora_request"):
            prompt.lora_request = lora
            setattr(prompt, _place(prompt), params)
        if self._get("lora_request", args, kwargs) is not lora:
            args, kwargs = self._set("lora_request", lora, args, kwargs)
        return self._set("params", params, args, kwargs)

    def _get(self, name: str, args: Any, kwargs: Any) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[self._at[name]] if self._at[name] < len(args) else None

    def _set(self, name: str, value: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        at = self._at[name]
        if name in kwargs or at >= len(args):
            return args, {**kwargs, name: value}
        return (*args[:at], value, *args[at + 1 :]), kwargs


def _place(prompt: Any) -> str:
    sampling = getattr(prompt, "sampling_params", None) is not None
    return "sampling_params" if sampling else "pooling_params"


@dataclass(frozen=True)
class _Call:
    """A call of `add_request`."""

    engine: Any
    arguments: _Arguments
    args: Any
    kwargs: Any

    def begin(self) -> Settled | Steps[Settled]:
        """What the request is to be sent with, or what must be done to know.

        Raises:
            AdapterError: what the request says is malformed.
        """
        lora, params = self.arguments.get(self.args, self.kwargs)
        if isinstance(lora, Spoken):
            return lora.target
        value = extras_of(params).get(FIELD)
        said = None if value is None else said_by(self.engine, value)
        return Settled(None) if lora is said is None else resolve(self.engine, said, lora)

    def end(self, target: Settled) -> tuple[Any, Any]:
        """The arguments to send the request with. Raises AdapterError."""
        lora, params = self.arguments.get(self.args, self.kwargs)
        to_send = carrying(params, target)
        if target.made is False:
            metrics.hit()
        if lora is target.lora and params is to_send:
            return self.args, self.kwargs
        return self.arguments.put(target.lora, to_send, self.args, self.kwargs)


_expected: ContextVar[str | None] = ContextVar("lora_ext_expected_version", default=None)


@contextmanager
def expecting(version: str | None) -> Iterator[None]:
    """Inside, `add_lora` may only replace this version; None: any."""
    token = _expected.set(version)
    try:
        yield
    finally:
        _expected.reset(token)


def _doubt(engine: Any, method: Any) -> None:
    if not str(method).startswith(OURS):
        Admitted.of(engine).doubt_all()


def _check_on(engine: Any) -> None:
    if engine.vllm_config.lora_config is None:
        raise no_adapters()


def _requests(name: str) -> list[LoRARequest]:
    """The same name is the same id, on every front end; a few more for names that meet in one."""
    start = int.from_bytes(sha256(name.encode()).digest()[:4], "little")
    ids = [MEMORY_IDS + (start + i) % (DERIVED_IDS - MEMORY_IDS) for i in range(TRIES)]
    return [LoRARequest(name, number, memory_path(name), load_inplace=True) for number in ids]


def _typed(error: Exception) -> Exception:
    return AdapterError.parse(str(error)) or error


def _source(tensors: Any, config: Any, settings: Any) -> list[Any]:
    source = MemorySource.of(tensors, config, settings)
    return [source.tensors, source.config, source.settings]


def _patch_sync(cls: type[Any]) -> None:
    add_request, add_lora = cls.add_request, cls.add_lora
    remove_lora, pin_lora = cls.remove_lora, cls.pin_lora
    collective_rpc, arguments = cls.collective_rpc, _Arguments(add_request)

    @functools.wraps(add_lora)
    def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        if self.vllm_config.lora_config is None:
            return add_lora(self, lora_request)
        run(self, load_first([lora_request], expected=_expected.get()))
        return True

    @functools.wraps(add_request)
    def new_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self, arguments, args, kwargs)
        target = call.begin()
        args, kwargs = call.end(target if isinstance(target, Settled) else run(self, target))
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

    @functools.wraps(collective_rpc)
    def new_collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return collective_rpc(self, method, *args, **kwargs)
        finally:
            _doubt(self, method)

    def add_adapter(
        self: Any, name: str, tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None, settings: Mapping[str, Any] | None = None,
        expected_version: str | None = None,
    ) -> LoRARequest:  # fmt: skip
        """Load an adapter that is tensors; by a name that was added before, it is that adapter's
        next version: requests that are there already end on the one they began with.

        Args:
            name: what the answer is named by; its id follows from it.
            tensors: as the adapter's safetensors file would name them.
            config: what `adapter_config.json` would hold; None for a format without one.
            settings: what `routing.json` would hold, if anything.
            expected_version: the version that this one follows (`adapter_version`); None: any.
        Returns:
            What requests are sent with. The engine keeps the adapter until `remove_lora`.
        Raises:
            AdapterError: what a folder of these files would raise; `version_conflict`, another
                version stands there. The version that was there goes on serving.
        """
        _check_on(self)
        source = _source(tensors, config, settings)
        request = run(self, load_first(_requests(name), source, expected_version))
        return msgspec.structs.replace(request, load_inplace=False)

    def roll_back_adapter(
        self: Any, request: LoRARequest, version: str, expected_version: str | None = None
    ) -> LoRARequest:
        """Have new requests get an older version of an adapter, if it is still held.

        Args:
            request: as of any version; version: the digest.
            expected_version: as of `add_adapter`.
        Returns:
            What requests are sent with from now on.
        Raises:
            AdapterError: `not_found`, `version_conflict`.
        """
        _check_on(self)
        return run(self, roll_back(request, version, expected_version))

    def adapter_version(self: Any, request: LoRARequest) -> str:
        """The digest of an adapter's content, which the next request for it is computed with; empty
        for one that was not loaded yet."""
        return Admitted.of(self).version(request.lora_int_id)

    cls.add_request, cls.add_lora = new_add_request, new_add_lora
    cls.remove_lora, cls.pin_lora = new_remove_lora, new_pin_lora
    cls.collective_rpc = new_collective_rpc
    cls.add_adapter, cls.roll_back_adapter = add_adapter, roll_back_adapter
    cls.adapter_version = adapter_version


def _patch_async(cls: type[Any]) -> None:
    add_request, add_lora = cls.add_request, cls.add_lora
    remove_lora, pin_lora = cls.remove_lora, cls.pin_lora
    collective_rpc, arguments = cls.collective_rpc, _Arguments(add_request)

    @functools.wraps(add_lora)
    async def new_add_lora(self: Any, lora_request: LoRARequest) -> bool:
        if self.vllm_config.lora_config is None:
            return await add_lora(self, lora_request)
        await run_async(self, load_first([lora_request], expected=_expected.get()))
        return True

    @functools.wraps(add_request)
    async def new_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self, arguments, args, kwargs)
        try:
            target = call.begin()
            if not isinstance(target, Settled):
                target = await run_async(self, target)
            args, kwargs = call.end(target)
        except AdapterError as error:
            raise RefusedRequest(error) from None
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

    @functools.wraps(collective_rpc)
    async def new_collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        _doubt(self, method)  # from now on the core is asked, which does one thing after the other
        try:
            return await collective_rpc(self, method, *args, **kwargs)
        finally:
            _doubt(self, method)

    async def add_adapter(
        self: Any, name: str, tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None, settings: Mapping[str, Any] | None = None,
        expected_version: str | None = None,
    ) -> LoRARequest:  # fmt: skip
        """As `LLMEngine.add_adapter`."""
        _check_on(self)
        source = _source(tensors, config, settings)
        request = await run_async(self, load_first(_requests(name), source, expected_version))
        return msgspec.structs.replace(request, load_inplace=False)

    async def roll_back_adapter(
        self: Any, request: LoRARequest, version: str, expected_version: str | None = None
    ) -> LoRARequest:
        """As `LLMEngine.roll_back_adapter`."""
        _check_on(self)
        return await run_async(self, roll_back(request, version, expected_version))

    def adapter_version(self: Any, request: LoRARequest) -> str:
        """As `LLMEngine.adapter_version`."""
        return Admitted.of(self).version(request.lora_int_id)

    cls.add_request, cls.add_lora = new_add_request, new_add_lora
    cls.remove_lora, cls.pin_lora = new_remove_lora, new_pin_lora
    cls.collective_rpc = new_collective_rpc
    cls.add_adapter, cls.roll_back_adapter = add_adapter, roll_back_adapter
    cls.adapter_version = adapter_version


def apply() -> None:
    """Wraps both engines' front ends."""
    _patch_sync(LLMEngine)
    _patch_async(AsyncLLM)
