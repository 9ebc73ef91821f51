"""Requests of APIs whose classes would drop the field `lora_ext` of a body without a word.

Targets: `AnthropicMessagesRequest` (`/v1/messages`), `GenerateRequest` (`/inference/v1/generate`)
and `CohereEmbedRequest` (`/v2/embed`), which from now on keep fields that they do not know, as
those of the OpenAI routes do; and `AnthropicServingMessages._build_base_request`, which makes a
request for a chat of the first.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.pooling.embed.protocol import CohereEmbedRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

from vllm_lora_ext.conditions.said import FIELD


def apply() -> None:
    """Opens the classes, before a server makes its routes of them."""
    for cls in (AnthropicMessagesRequest, GenerateRequest, CohereEmbedRequest):
        cls.model_config["extra"] = "allow"
        cls.model_rebuild(force=True)
    build: Any = AnthropicServingMessages._build_base_request.__func__

    @functools.wraps(build)
    def new_build(cls: Any, anthropic_request: Any, *args: Any, **kwargs: Any) -> Any:
        chat = build(cls, anthropic_request, *args, **kwargs)
        value = (anthropic_request.model_extra or {}).get(FIELD)
        if value is not None:
            chat.model_extra[FIELD] = value
        return chat

    AnthropicServingMessages._build_base_request = classmethod(new_build)
