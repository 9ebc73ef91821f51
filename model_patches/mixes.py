"""Merged adapters by name in a request.

Targets, wrapped only when a server with the setting `merge` starts: `_check_model` of both serving
classes and `_maybe_get_adapters`. The front end's process alone does all this.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.adapter_paths import find_folder
from vllm_lora_ext.model_patches.admin import AdminToken
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.exchange import current, note_version
from vllm_lora_ext.model_patches.refused import RefusedRequest, engine_dead, to_response
from vllm_lora_ext.model_patches.says_http import speaking
from vllm_lora_ext.serving import Mix, Mixes, from_lorax, is_mix_name, parse
from vllm_lora_ext.settings import LoraExtSettings

LORAX = "merged_adapters"


class Front:
    """One server's mixes, and what it does for them (`serving.Host`)."""

    def __init__(self, models: Any, engine: Any, settings: LoraExtSettings) -> None:
        config = engine.vllm_config
        self._models, self.engine, self._lora = models, engine, config.lora_config
        self.settings, merge = settings, settings.merge
        self.by_name = self._lora is not None and merge is not None and merge.enabled
        self._given: dict[int, LoRARequest] = {}
        token = settings.admin_token_file
        self._token = None if token is None else AdminToken(token)
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

    def guard(self) -> None:
        """Raises AdapterError where a client may not change what is loaded (`AdminToken`)."""
        if self._token is not None:
            self._token.check(current())

    def check_name(self, name: str) -> None:
        """Raises AdapterError `bad_value`: it is the name of a mix, in any spelling."""
        if not self.by_name or not name or not is_mix_name(name):
            return
        try:
            parse(name)
        except AdapterError:
            return  # no mix can have it
        raise AdapterError(
            "bad_value", "lora_name is the name of a mix, which the server merges when a request"
            " names it", seen=name, fix="choose another name",
        )  # fmt: skip

    @property
    def used(self) -> bool:
        return "mixes" in self.__dict__

    def made(self) -> dict[str, str]:
        """By folder, the mix's name or the path that was sent, of adapters that were made here."""
        return self.mixes.made() if self.used else {}

    @property
    def max_rank(self) -> int:
        return int(self._lora.max_lora_rank)

    @property
    def dtype(self) -> str:
        return str(self._lora.lora_dtype).removeprefix("torch.")

    def adapters(self) -> Mapping[str, tuple[str, str]]:
        made, version = self.mixes.names(), Admitted.of(self.engine).version
        known = self._models.lora_requests.items()
        return {n: (r.lora_path, version(r.lora_int_id)) for n, r in known if n not in made}

    def folder(self, path: str) -> Path:
        return Path(find_folder(path, self.settings.readable_roots()))

    async def load(self, name: str, path: Path) -> LoRARequest:
        request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(path))
        await self.engine.add_lora(request)
        return request

    async def roll_back(self, name: str, version: str, expected: str | None) -> ErrorResponse | str:
        """Has new requests by a name get an older version of its adapter."""
        models = self._models
        try:
            self.guard()
            self._loaded(name)  # a name's lock stays, so nobody makes one who changes nothing
            async with models.lora_resolver_lock[name]:
                loaded = self._loaded(name)
                back = await self.engine.roll_back_adapter(loaded, version, expected)
                models.lora_requests[name] = back
        except AdapterError as error:
            return to_response(error, "version")
        except EngineDeadError:
            return to_response(engine_dead(), None)
        if self.used:
            self.mixes.rolled_back(name, version)
        note_version(version)
        return f"Success: LoRA adapter '{name}' is at version {version}."

    def _loaded(self, name: str) -> LoRARequest:
        loaded: LoRARequest | None = self._models.lora_requests.get(name)
        if loaded is None:
            raise AdapterError(
                "not_found", "no adapter of this name is loaded", seen=name, fix="load it"
            )
        return loaded

    def show(self, model: str, loaded: object) -> None:
        self._models.lora_requests[model] = loaded

    async def forget(self, loaded: object) -> None:
        assert isinstance(loaded, LoRARequest)
        await self.engine.remove_lora(loaded.lora_int_id)

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
def hook_requests() -> None:
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
        if given is not None:
            return speaking(self.models, request, given)
        return get_adapters(self, request, *args, **kwargs)

    BaseServing._check_model = new_check
    PoolingBaseServing._check_model = new_check_pooling
    BaseServing._maybe_get_adapters = new_get_adapters


def apply() -> None:
    """Nothing at start: `frontend` wraps when a server asks for mixes."""
