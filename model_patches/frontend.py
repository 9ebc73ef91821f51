"""The server's list of models: adapters by path, by recipe, and merged by name.

Targets: `OpenAIServingModels.{__init__, load_lora_adapter, unload_lora_adapter,
_check_unload_lora_adapter_request, show_available_models}`. Stock answers every load error but
"not found" with 500 and forgets what kind it was; here the client gets 4xx and the stable code. The
path of an adapter may be a recipe's file: what is loaded is its merge. An unload ends what stands
behind the name when it has its turn, and with `expected_version` no other version. And `logger` of
the same module, which says of a reload what is not so here.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

import msgspec
import vllm.entrypoints.openai.models.serving as stock
from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import metrics
from vllm_lora_ext.model_patches.admission import expecting
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.exchange import note_version
from vllm_lora_ext.model_patches.held import version_conflict
from vllm_lora_ext.model_patches.mixes import Front, hook_requests
from vllm_lora_ext.model_patches.refused import engine_dead, hide_paths, to_response
from vllm_lora_ext.model_patches.rewards import Rewards
from vllm_lora_ext.settings import LoraExtSettings

logger = init_logger(f"vllm.{__name__}")
RECIPE_FILES = (".yaml", ".yml", ".json")
_STALE_BLOCKS = "Reloaded LoRA adapter '%s' in place from the same path"


@dataclass
class _Unload:
    """The body of an unload.

    Args:
        loaded: what it is of, once stock has the name's lock: it may have waited for a load.
    """

    lora_name: str
    expected_version: str | None
    loaded: LoRARequest | None = None


def _is_true(record: logging.LogRecord) -> bool:
    """Not so stock's warning that a reload from the same path leaves blocks of the weights before
    in the prefix cache: their keys name the version (`block_keys`)."""
    return not str(record.msg).startswith(_STALE_BLOCKS)


def _warn_of_open_door(config: Any, settings: LoraExtSettings) -> None:
    open_door = config.lora_config and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
    if open_door and settings.adapter_roots is None:
        logger.warning(
            "Run-time LoRA loading may read any path that this server can. Name the "
            "folders that hold adapters: --additional-config "
            '\'{"lora_ext": {"adapter_roots": ["/path/to/adapters"]}}\''
        )


def _refusal(name: str, error: AdapterError, param: str = "lora_path") -> ErrorResponse:
    logger.warning("Refused LoRA adapter %r: %s", name, error)
    return to_response(error, param)


def _with(request: Any, **changes: Any) -> Any:
    """A copy of a load's body, which is a pydantic model or, of SageMaker's route, a namespace."""
    changed = copy.copy(request)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _typed(engine: Any, name: str, sent: str, answer: Any) -> Any:
    """Stock's answer to a load of the path `sent`; our errors have their code again."""
    if isinstance(answer, ErrorResponse):
        error = AdapterError.parse(answer.error.message)
        if error is None and engine.errored:
            error = engine_dead()
        return hide_paths(answer, [sent]) if error is None else _refusal(name, error)
    return answer


def _loaded_once(models: Any, name: str) -> None:
    """Stock 0.32 keeps the flag, and every later request would load the adapter again."""
    loaded = models.lora_requests.get(name)
    if loaded is not None:  # else unloaded again meanwhile
        models.lora_requests[name] = msgspec.structs.replace(loaded, load_inplace=False)


def _is_recipe(path: str | None) -> bool:
    return bool(path) and str(path).endswith(RECIPE_FILES) and not os.path.isdir(str(path))


def apply() -> None:
    """Wraps the list of models; the request path only when a server asks for mixes."""
    init, load = OpenAIServingModels.__init__, OpenAIServingModels.load_lora_adapter
    unload = OpenAIServingModels.unload_lora_adapter
    check_unload = OpenAIServingModels._check_unload_lora_adapter_request
    show = OpenAIServingModels.show_available_models

    @functools.wraps(init)
    def new_init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(self, engine_client, *args, **kwargs)
        config = engine_client.vllm_config
        settings = LoraExtSettings.from_additional_config(config.additional_config)
        self._lora_ext_front = Front(self, engine_client, settings)
        if self._lora_ext_front.by_name:
            hook_requests()
        if config.lora_config is not None:
            metrics.show()
            Admitted.of(engine_client).list_by(self.lora_requests)
        if settings.reward is not None:
            Rewards.of(engine_client)  # what is wrong with them ends the start
        _warn_of_open_door(config, settings)

    @functools.wraps(load)
    async def new_load(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        front, name, entry = self._lora_ext_front, request.lora_name, None
        sent = str(request.lora_path)
        try:
            front.guard()
        except AdapterError as error:
            return _refusal(name, error)
        try:
            front.check_name(name)
        except AdapterError as error:
            return _refusal(name, error, "lora_name")
        expected = getattr(request, "expected_version", None)
        if expected is not None:
            request = _with(request, load_inplace=True)
        if _is_recipe(request.lora_path):
            try:
                entry = await front.mixes.build_recipe(request.lora_path)
            except AdapterError as error:
                return _refusal(name, error)
        try:
            if entry is not None:
                request = _with(request, lora_path=str(entry.path))
            with expecting(expected):
                answer = await load(self, request, *args, **kwargs)
            if entry is not None and isinstance(answer, ErrorResponse):
                answer.error.message = entry.shown(answer.error.message)
            answer = _typed(front.engine, name, sent, answer)
        except asyncio.CancelledError:
            answer = None
            raise
        finally:
            if entry is not None and not isinstance(answer, str):
                front.mixes.discard(entry)
        if isinstance(answer, str):
            _loaded_once(self, name)
            loaded, version = self.lora_requests.get(name), ""
            if loaded is not None:
                version = Admitted.of(front.engine).version(loaded.lora_int_id)
                note_version(version)
            if entry is not None:
                front.mixes.loaded(name, entry, version)
        return answer

    @functools.wraps(unload)
    async def new_unload(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        front, name = self._lora_ext_front, request.lora_name
        try:
            front.guard()
        except AdapterError as error:
            return _refusal(name, error)
        body = _Unload(name, getattr(request, "expected_version", None))
        answer = await unload(self, body, *args, **kwargs)
        if body.loaded is not None:
            if front.used:  # at once: the name may be loaded again while the engine is told
                front.mixes.unloaded(name)
            # Stock keeps it until others need the room.
            await front.engine.remove_lora(body.loaded.lora_int_id)
        return answer

    @functools.wraps(check_unload)
    async def new_check_unload(self: Any, request: _Unload) -> ErrorResponse | None:
        """Under the lock: what passes is taken from the list next."""
        answer: ErrorResponse | None = await check_unload(self, request)
        if answer is not None:
            return answer
        name, expected = request.lora_name, request.expected_version
        loaded = self.lora_requests[name]
        version = Admitted.of(self._lora_ext_front.engine).version(loaded.lora_int_id)
        if expected is not None and expected != version:
            return _refusal(name, version_conflict(name, version, expected), "expected_version")
        request.loaded = loaded
        return None

    @functools.wraps(show)
    async def new_show(self: Any) -> Any:
        models, made = await show(self), self._lora_ext_front.made()
        for card in models.data:  # else of the folder where the server keeps what it has made
            card.root = made.get(card.root, card.root)
        return models

    OpenAIServingModels.__init__ = new_init
    OpenAIServingModels.show_available_models = new_show
    OpenAIServingModels.load_lora_adapter = new_load
    OpenAIServingModels.unload_lora_adapter = new_unload
    OpenAIServingModels._check_unload_lora_adapter_request = new_check_unload
    stock.logger.addFilter(_is_true)
