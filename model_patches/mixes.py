"""Merged adapters by name in a request, and recipe files as the path of an adapter.

Targets: `OpenAIServingModels.{__init__, load_lora_adapter, unload_lora_adapter}`; and, only when a
server with the setting `merge` starts, `_check_model` of both serving classes and
`_maybe_get_adapters`. The front end's process alone does all this.
"""

from __future__ import annotations

import asyncio
import functools
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.http import to_response
from vllm_lora_ext.model_patches.trace_http import RefusedRequest
from vllm_lora_ext.model_patches.worker import find_folder, shortest
from vllm_lora_ext.serving import Mix, Mixes, from_lorax, is_mix_name, parse
from vllm_lora_ext.settings import LoraExtSettings

logger = init_logger(f"vllm.{__name__}")
LORAX = "merged_adapters"
RECIPE_FILES = (".yaml", ".yml", ".json")


class Front:
    """One server's mixes, and what it does for them (`serving.Host`)."""

    def __init__(self, models: Any, engine: Any) -> None:
        config = engine.vllm_config
        self._models, self._engine, self._lora = models, engine, config.lora_config
        self.settings = LoraExtSettings.from_additional_config(config.additional_config)
        merge = self.settings.merge
        self.by_name = self._lora is not None and merge is not None and merge.enabled
        self._given: dict[int, LoRARequest] = {}
        processes = config.parallel_config._api_process_count
        if self.by_name and processes > 1:
            raise AdapterError(
                "bad_settings", "the setting merge needs one front end: each gives its own ids",
                seen=processes, limit=1, fix="start with --api-server-count 1",
            )  # fmt: skip

    @functools.cached_property
    def mixes(self) -> Mixes:
        """Made when first needed: it has folders on disk."""
        return Mixes(self.settings, self)

    @property
    def used(self) -> bool:
        return "mixes" in self.__dict__

    @property
    def max_rank(self) -> int:
        return int(self._lora.max_lora_rank)

    @property
    def dtype(self) -> str:
        return str(self._lora.lora_dtype).removeprefix("torch.")

    def adapters(self) -> Mapping[str, tuple[str, int]]:
        made = self.mixes.names()
        known = self._models.lora_requests.items()
        return {name: (r.lora_path, r.lora_int_id) for name, r in known if name not in made}

    def folder(self, path: str) -> Path:
        return Path(find_folder(shortest(path), self.settings.readable_roots()))

    async def load(self, name: str, path: Path) -> LoRARequest:
        request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(path))
        await self._engine.add_lora(request)
        return request

    def show(self, model: str, loaded: object) -> None:
        self._models.lora_requests[model] = loaded

    async def forget(self, loaded: object) -> None:
        assert isinstance(loaded, LoRARequest)
        await self._engine.remove_lora(loaded.lora_int_id)

    def hide(self, model: str) -> None:
        self._models.lora_requests.pop(model, None)

    async def resolve(self, request: Any) -> None:
        """Has the mix that the request names loaded, and the request name it canonically.

        Raises:
            AdapterError: the mix cannot be had.
        """
        mix = self._mix_of(request)
        if mix is not None and not self._registered(str(mix)):
            request.model = await self.mixes.serve(mix, request)
            # It may be replaced while the prompt is read; this request keeps the one it has.
            self._given[id(request)] = self._models.lora_requests[request.model]
            weakref.finalize(request, self._given.pop, id(request), None).atexit = False
        elif request.model and self.used:
            self.mixes.hold(request.model, request)

    def given(self, request: Any) -> LoRARequest | None:
        """The mix that `resolve` had loaded for this request."""
        return self._given.get(id(request))

    def _mix_of(self, request: Any) -> Mix | None:
        model, lorax = request.model, (request.model_extra or {}).get(LORAX)
        if lorax is not None:
            if model and not self._models.is_base_model(model):
                raise AdapterError(
                    "bad_value", f"{LORAX} stands beside a model that is not the base model",
                    seen=model, fix="name the base model, or leave merged_adapters out",
                )  # fmt: skip
            return from_lorax(lorax)
        if not model or self._registered(model) or not is_mix_name(model):
            return None
        return parse(model)

    def _registered(self, model: str) -> bool:
        """A name that somebody gave to a model is that model's."""
        known = self._models.lora_requests
        made = self.mixes.names() if self.used else ()
        return self._models.is_base_model(model) or (model in known and model not in made)


def _front(models: Any) -> Front | None:
    front: Front | None = getattr(models, "_lora_ext_front", None)
    return front if front is not None and front.by_name else None


@functools.cache
def _hook_requests() -> None:
    """From now on, the models of requests may be mixes."""
    check, check_pooling = BaseServing._check_model, PoolingBaseServing._check_model
    get_adapters = BaseServing._maybe_get_adapters

    @functools.wraps(check)
    async def new_check(self: Any, request: Any) -> ErrorResponse | None:
        front = _front(self.models)
        try:
            if front is not None:
                await front.resolve(request)
        except AdapterError as error:
            return to_response(error, "model")
        return await check(self, request)

    @functools.wraps(check_pooling)
    async def new_check_pooling(self: Any, request: Any) -> ErrorResponse | None:
        front = _front(self.models)
        try:
            if front is not None:
                await front.resolve(request)
        except AdapterError as error:
            raise RefusedRequest(error) from None
        return await check_pooling(self, request)

    @functools.wraps(get_adapters)
    def new_get_adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        front = _front(self.models)
        given = front.given(request) if front is not None else None
        return given or get_adapters(self, request, *args, **kwargs)

    BaseServing._check_model = new_check
    PoolingBaseServing._check_model = new_check_pooling
    BaseServing._maybe_get_adapters = new_get_adapters


def _is_recipe(path: str | None) -> bool:
    return bool(path) and str(path).endswith(RECIPE_FILES) and not os.path.isdir(str(path))


def apply() -> None:
    """Wraps the list of models; the request path only when a server asks for mixes."""
    init, load = OpenAIServingModels.__init__, OpenAIServingModels.load_lora_adapter
    unload = OpenAIServingModels.unload_lora_adapter

    @functools.wraps(init)
    def new_init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(self, engine_client, *args, **kwargs)
        self._lora_ext_front = Front(self, engine_client)
        if self._lora_ext_front.by_name:
            _hook_requests()

    @functools.wraps(load)
    async def new_load(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        front, entry = self._lora_ext_front, None
        if _is_recipe(request.lora_path):
            try:
                entry = await front.mixes.build_recipe(request.lora_path)
            except AdapterError as error:
                logger.warning("Refused recipe for %r: %s", request.lora_name, error)
                return to_response(error)
            request = request.model_copy(update={"lora_path": str(entry.path)})
        try:
            answer = await load(self, request, *args, **kwargs)
        except asyncio.CancelledError:
            answer = None
            raise
        finally:
            if entry is not None and not isinstance(answer, str):
                front.mixes.discard(entry)
        if isinstance(answer, str) and front.used:
            front.mixes.loaded(request.lora_name, entry)
        return answer

    @functools.wraps(unload)
    async def new_unload(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await unload(self, request, *args, **kwargs)
        if isinstance(answer, str) and self._lora_ext_front.used:
            self._lora_ext_front.mixes.unloaded(request.lora_name)
        return answer

    OpenAIServingModels.__init__ = new_init
    OpenAIServingModels.load_lora_adapter = new_load
    OpenAIServingModels.unload_lora_adapter = new_unload
