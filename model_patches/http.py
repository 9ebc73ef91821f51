"""Adapter errors reach HTTP clients as 4xx with their stable code.

Targets: `OpenAIServingModels.{__init__, load_lora_adapter}`. Stock answers every load error but
"not found" with 500 and forgets what kind it was.
"""

from __future__ import annotations

import functools
from collections import Counter
from http import HTTPStatus
from typing import Any

import msgspec
from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logger import init_logger

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.worker import shortest
from vllm_lora_ext.settings import LoraExtSettings

logger = init_logger(f"vllm.{__name__}")
_STATUS = {
    "not_found": HTTPStatus.NOT_FOUND,
    "path_not_allowed": HTTPStatus.FORBIDDEN,
    "merge_busy": HTTPStatus.TOO_MANY_REQUESTS,
    "merge_failed": HTTPStatus.INTERNAL_SERVER_ERROR,
}


def to_response(error: AdapterError, param: str = "lora_path") -> ErrorResponse:
    """The error as an OpenAI-style body: `type` is the stable code."""
    return create_error_response(
        message=error.text,
        err_type=error.code,
        status_code=_STATUS.get(error.code, HTTPStatus.BAD_REQUEST),
        param=param,
    )


def _fresh(models: Any, request: Any) -> Any:
    """The request, its path spelt in a way that this name was never loaded from before.

    The prefix cache knows an adapter by name and path. Files that changed behind both would be
    answered from KV of the old weights; `DIR/.` and `DIR//.` are the same folder and other keys.
    The number of earlier loads is written with these two as digits, so that the path stays short
    however often an adapter is replaced.
    """
    if not request.lora_path:
        return request
    counts = models.__dict__.setdefault("_lora_ext_loads", Counter())
    path = shortest(request.lora_path)
    loads = counts[request.lora_name, path]
    counts[request.lora_name, path] += 1
    digits = f"{loads:b}" if loads else ""
    path += "".join("//." if digit == "1" else "/." for digit in digits)
    return request.model_copy(update={"lora_path": path})


def apply() -> None:
    """Wraps the handler of the load route, and says at start what run-time loading may read."""
    init, load = OpenAIServingModels.__init__, OpenAIServingModels.load_lora_adapter

    @functools.wraps(init)
    def new_init(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(self, engine_client, *args, **kwargs)
        config = engine_client.vllm_config
        settings = LoraExtSettings.from_additional_config(config.additional_config)
        open_door = config.lora_config and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
        if open_door and settings.adapter_roots is None:
            logger.warning(
                "Run-time LoRA loading may read any path that this server can. Name the "
                "folders that hold adapters: --additional-config "
                '\'{"lora_ext": {"adapter_roots": ["/path/to/adapters"]}}\''
            )

    @functools.wraps(load)
    async def new_load(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        request = _fresh(self, request)
        answer = await load(self, request, *args, **kwargs)
        if isinstance(answer, ErrorResponse):
            error = AdapterError.parse(answer.error.message)
            if error is None:
                return answer
            logger.warning("Refused LoRA adapter %r: %s", request.lora_name, error)
            return to_response(error)
        # Stock 0.32 keeps the flag, and every later request would load the adapter again.
        loaded = self.lora_requests.get(request.lora_name)
        if loaded is not None:  # unloaded again meanwhile
            self.lora_requests[request.lora_name] = msgspec.structs.replace(
                loaded, load_inplace=False
            )
        return answer

    OpenAIServingModels.__init__ = new_init
    OpenAIServingModels.load_lora_adapter = new_load
