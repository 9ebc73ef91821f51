"""The field `lora_ext` in the body of a request, on every route that names a model.

Targets: `_check_model` of both serving classes, where what is wrong becomes an answer before
anything is computed or streamed, and `_maybe_get_adapters`, whose result every route hands to its
engine (`Spoken` carries what was said there). And what makes answers of a prompt's tokens
(`AsyncLLM.generate`; beam search and the Responses API, whose generators call it later): what only
they show to be wrong is found before a stream begins, for then it is too late for a 400.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.scale_out.derender.serving import ServingDerender
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_lora_ext.conditions.said import FIELD
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.driving import run_async
from vllm_lora_ext.model_patches.exchange import note_version
from vllm_lora_ext.model_patches.refused import RefusedRequest, to_response
from vllm_lora_ext.model_patches.request_says import resolve, said_by
from vllm_lora_ext.model_patches.request_settled import Settled, Spoken, check_input
from vllm_lora_ext.trace.fetch import check_on

# Routes that name a model and compute nothing with it: there is nothing to say to them.
_WORDS_ONLY = (ServingTokenization, ServingRender, ServingDerender)


@dataclass(frozen=True)
class _Heard:
    """In the place of the field, once it was found right."""

    target: Settled
    own: LoRARequest | None  # the adapter of the request's model


async def hear(models: Any, request: Any) -> None:
    """Settles with which adapter, and with which version of it, a request is computed.

    Args:
        models: the server's list of them; request: of a known model.
    Raises:
        AdapterError: it cannot be served.
    """
    front, extra = getattr(models, "_lora_ext_front", None), getattr(request, "model_extra", None)
    if front is None or extra is None:
        return
    value, own = _value(request, extra), models.lora_requests.get(request.model)
    if value is own is None:
        return
    said = None if value is None else said_by(front.engine, value)
    target = await run_async(front.engine, resolve(front.engine, said, own, _last_message(request)))
    extra[FIELD] = _Heard(target, own)
    note_version(target.version)


def speaking(models: Any, request: Any, own: LoRARequest | None) -> LoRARequest | None:
    """What the engine gets as the adapter of a request.

    Args:
        own: the adapter of its model, or one that vLLM adds by itself for an image.
    """
    heard = (getattr(request, "model_extra", None) or {}).get(FIELD)
    if not isinstance(heard, _Heard):
        return own
    name, number = models.base_model_paths[0].name, 1
    if heard.own is not None:
        name, number = heard.own.lora_name, heard.own.lora_int_id
    return Spoken(name, number, f"{FIELD} of a request", target=heard.target)


def _checking(stock: Callable[..., Any], prompt: str) -> Callable[..., Any]:
    """A generator function that looks at what it is given when it is called.

    Args:
        prompt: the name of its argument that holds the tokens, or its first.
    """

    @functools.wraps(stock)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        spoken = kwargs.get("lora_request")
        if isinstance(spoken, Spoken):
            engine = getattr(self, "engine_client", self)
            _check_spoken(engine, kwargs[prompt] if prompt in kwargs else args[0], spoken)
        return stock(self, *args, **kwargs)

    return checked


def _check_spoken(engine: Any, prompt: Any, spoken: Spoken) -> None:
    try:
        if spoken.target.trace:
            check_on(engine.vllm_config.additional_config)
        check_input(prompt, spoken.target)
    except AdapterError as error:
        raise RefusedRequest(error) from None


def _value(request: Any, extra: Mapping[str, Any]) -> object:
    value = extra.get(FIELD)
    params = getattr(request, "sampling_params", None)  # of requests that are tokens
    for place, args in (
        ("vllm_xargs", getattr(request, "vllm_xargs", None)),
        ("sampling_params.extra_args", getattr(params, "extra_args", None)),
    ):
        if args and FIELD in args:
            if value is not None:
                raise AdapterError(
                    "bad_value", f"{FIELD} stands in the body and in {place}",
                    fix="keep one of them",
                )  # fmt: skip
            value = args.pop(FIELD)
    return value


def _last_message(request: Any) -> str | None:
    """The text of the last message of a user, in a chat or in `input` of the Responses API."""
    messages: Any = getattr(request, "messages", None)
    if messages is None:
        messages = getattr(request, "input", None)
    if isinstance(messages, str):
        return messages
    said: list[Any] = messages if isinstance(messages, list) else []
    for message in reversed(said):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return _text(message.get("content"))
    return None


def _text(content: object) -> str | None:
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) and content else None


def apply() -> None:
    """Wraps them all."""
    check, check_pooling = BaseServing._check_model, PoolingBaseServing._check_model
    get_adapters, answers = BaseServing._maybe_get_adapters, OpenAIServingResponses

    @functools.wraps(check)
    async def new_check(self: Any, request: Any) -> ErrorResponse | None:
        answer = await check(self, request)
        if answer is None and not isinstance(self, _WORDS_ONLY):
            try:
                await hear(self.models, request)
            except AdapterError as error:
                return to_response(error, FIELD)
        return answer

    @functools.wraps(check_pooling)
    async def new_check_pooling(self: Any, request: Any) -> ErrorResponse | None:
        answer = await check_pooling(self, request)
        try:
            await hear(self.models, request)
        except AdapterError as error:
            raise RefusedRequest(error) from None
        return answer

    @functools.wraps(get_adapters)
    def new_get_adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        return speaking(self.models, request, get_adapters(self, request, *args, **kwargs))

    BaseServing._check_model = new_check
    PoolingBaseServing._check_model = new_check_pooling
    BaseServing._maybe_get_adapters = new_get_adapters
    AsyncLLM.generate = _checking(AsyncLLM.generate, "prompt")
    BeamSearchOnlineMixin.beam_search = _checking(BeamSearchOnlineMixin.beam_search, "prompt")
    answers._generate_with_builtin_tools = _checking(
        answers._generate_with_builtin_tools, "engine_input"
    )
