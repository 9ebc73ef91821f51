"""The body field on vLLM's own request and serving classes, with a core that only takes notes."""

from __future__ import annotations

import asyncio
import json
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import UploadFile
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.pooling.base.protocol import PoolingBasicRequestMixin
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest
from vllm.entrypoints.pooling.embed.protocol import CohereEmbedRequest, EmbeddingCompletionRequest
from vllm.entrypoints.pooling.scoring.protocol import ScoreTextRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from tests.model_patches.test_request_says import ADAPTERS, AsyncEngine, lora, parts
from vllm_lora_ext import plugin
from vllm_lora_ext.conditions.recipe import Recipe
from vllm_lora_ext.model_patches.admission import _patch_async
from vllm_lora_ext.model_patches.refused import RefusedRequest

plugin.register()
IMAGE = {"image": [[1, 4]]}
BOTH = {"adapters": [{"name": "b", "scale": 0.5}, {"name": "a"}]}
GENERATING = {
    "completion": lambda **more: CompletionRequest(prompt="hi", **more),
    "chat": lambda **more: ChatCompletionRequest(
        messages=[
            {"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [{"type": "text", "text": "last"}]},
        ], **more,
    ),
    "responses": lambda **more: ResponsesRequest(input="last", **more),
    "messages": lambda **more: AnthropicServingMessages.to_chat_completion_request(
        AnthropicMessagesRequest(
            messages=[{"role": "user", "content": [{"type": "text", "text": "last"}]}],
            max_tokens=1, **more,
        )
    ),
}  # fmt: skip
TOKENS = {
    "tokens": lambda **more: GenerateRequest(
        token_ids=[5], sampling_params=SamplingParams(), **more
    ),
}  # fmt: skip
POOLING = {
    "embed, Cohere": lambda **more: CohereEmbedRequest(texts=["hi"], **more),
    "embed": lambda **more: EmbeddingCompletionRequest(input="hi", **more),
    "classify": lambda **more: ClassificationCompletionRequest(input="hi", **more),
    "score": lambda **more: ScoreTextRequest(text_1="hi", text_2="ho", **more),
}
ALL = GENERATING | TOKENS | POOLING
# What makes answers of a prompt's tokens.
ANSWERING = {
    "generate": lambda engine, prompt, given: AsyncLLM.generate(
        engine, prompt, SamplingParams(), "r", lora_request=given
    ),
    "beam search": lambda engine, prompt, given: BeamSearchOnlineMixin.beam_search(
        SimpleNamespace(engine_client=engine), prompt=prompt, request_id="r", params=None,
        lora_request=given,
    ),
    "responses": lambda engine, prompt, given: OpenAIServingResponses._generate_with_builtin_tools(
        SimpleNamespace(engine_client=engine), request_id="r", engine_input=prompt,
        sampling_params=SamplingParams(), context=None, lora_request=given,
    ),
}  # fmt: skip


class Engine(AsyncEngine):
    """As an `EngineClient` is for its servers."""

    def __init__(self) -> None:
        super().__init__()
        self.vllm_config.parallel_config = SimpleNamespace(_api_process_count=1)
        self.vllm_config.lora_config = SimpleNamespace(max_lora_rank=16, lora_dtype="float32")
        self.model_config = SimpleNamespace(model="base", max_model_len=64)
        self.input_processor = None

    add_request, add_lora = AsyncEngine.add_request, AsyncEngine.add_lora
    remove_lora, pin_lora = AsyncEngine.remove_lora, AsyncEngine.pin_lora


_patch_async(Engine)


@pytest.fixture
def models() -> Any:
    engine = Engine()
    made = OpenAIServingModels(engine, [BaseModelPath("base", "/base")])
    made.engine = engine
    for name in ADAPTERS:
        asyncio.run(engine.add_lora(lora(name)))
        made.lora_requests[name] = lora(name)
    engine.core.added.clear()
    return made


class Pooler(PoolingBaseServing):
    def __init__(self, models: Any) -> None:
        BaseServing.__init__(self, models, models.engine.model_config)

    get_io_processor = _build_response = None


def send(models: Any, request: Any) -> tuple[str, LoRARequest | None, Any]:
    """The model that the answer names; the adapter and the plan that reach the engine's core."""
    pooling = isinstance(request, (PoolingBasicRequestMixin, CohereEmbedRequest))
    server = Pooler(models) if pooling else BaseServing(models, models.engine.model_config)
    answer = asyncio.run(server._check_model(request))
    assert answer is None, answer
    given = server._maybe_get_adapters(request)
    asyncio.run(models.engine.add_request("r", "p", SamplingParams(), lora_request=given))
    params, adapter = models.engine.sent[-1]
    plan = dict((params.extra_args or {}).get("lora_ext") or {})
    assert bool(plan.pop("version", "")) == (adapter is not None)
    return models.model_name(given), adapter, plan or None


@pytest.mark.parametrize("kind", ALL)
def test_the_body_field_reaches_the_engine(models, kind):
    make = ALL[kind]
    name, adapter, plan = send(models, make(model="base", lora_ext=BOTH))
    assert (name, parts(adapter), plan) == ("base", [("a", 1.0), ("b", 0.5)], None)
    name, adapter, plan = send(models, make(model="mm", lora_ext={"modality_spans": {"image": []}}))
    assert (name, adapter) == ("mm", lora("mm"))
    assert len(plan["columns"]) == 2
    assert set(models.lora_requests) == set(ADAPTERS), "derived ones are no models"


@pytest.mark.parametrize("kind", GENERATING)
def test_vllm_xargs_is_the_same(models, kind):
    text = '{"adapters": [{"name": "b", "spans": [[1, 2]]}]}'
    request = GENERATING[kind](model="base", vllm_xargs={"lora_ext": text, "mine": 1})
    _, adapter, plan = send(models, request)
    assert parts(adapter) == [("b", 1.0)] and plan == {"columns": [{"spans": [[1, 2]]}]}
    assert request.vllm_xargs == {"mine": 1}


def test_who_says_nothing_is_not_looked_at(models):
    for model, own in (("base", None), ("a", lora("a"))):
        assert send(models, GENERATING["chat"](model=model)) == (model, own, None)
        request = GENERATING["chat"](model=model, lora_ext=None)
        assert send(models, request) == (model, own, None)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("model", "value", "words"),
    [
        ("base", {"adaptors": []}, "lora_ext.adaptors is unknown"),
        ("base", 7, "lora_ext of the request is no object"),
        ("base", {"adapters": [{"name": "x"}]}, "lora_ext.adapters[0].name is no loaded adapter"),
        ("b", {"adapters": [{"name": "a"}]}, "beside a model that is not the base model"),
        ("reclora", {"user": [1]}, "not of the length"),
        ("reclora", None, "lora_ext.user is missing"),
    ],
)
def test_what_is_wrong_is_answered_before_anything_is_computed(models, kind, model, value, words):
    request = ALL[kind](model=model, lora_ext=value)
    if kind in POOLING:
        with pytest.raises(RefusedRequest) as caught:
            send(models, request)
        code, status, text = caught.value.code, caught.value.http_status, caught.value.text
    else:
        server = BaseServing(models, models.engine.model_config)
        error = asyncio.run(server._check_model(request)).error
        code, status, text = error.type, error.code, error.message
        assert error.param == "lora_ext"
    assert (code, status) == ("bad_value", 400)
    assert words in text
    assert models.engine.sent == []


def test_tokens_say_it_in_their_sampling_parameters_too(models):
    params = SamplingParams(extra_args={"lora_ext": BOTH})
    request = GenerateRequest(token_ids=[5], model="base", sampling_params=params)
    name, adapter, _ = send(models, request)
    assert (name, parts(adapter)) == ("base", [("a", 1.0), ("b", 0.5)])
    assert not request.sampling_params.extra_args


@pytest.mark.parametrize("kind", [TranscriptionRequest, TranslationRequest])
def test_a_form_says_it_as_text(models, kind):
    request = kind(model="base", file=UploadFile(BytesIO()), lora_ext=json.dumps(BOTH))
    name, adapter, _ = send(models, request)
    assert (name, parts(adapter)) == ("base", [("a", 1.0), ("b", 0.5)])


def test_tokenizing_asks_for_no_user(models):
    """Nothing is computed with the adapter."""
    server = ServingTokenization.__new__(ServingTokenization)
    BaseServing.__init__(server, models, models.engine.model_config)
    request = TokenizeCompletionRequest(model="reclora", prompt="hi", lora_ext={"nothing": 1})
    assert asyncio.run(server._check_model(request)) is None
    assert server._maybe_get_adapters(request) == lora("reclora")
    assert models.engine.core.added == []


@pytest.mark.parametrize("kind", ["chat", "messages", "tokens"])
def test_it_is_said_once(models, kind):
    if kind == "tokens":
        params = SamplingParams(extra_args={"lora_ext": {}})
        request = GenerateRequest(
            token_ids=[5], sampling_params=params, model="base", lora_ext={}
        )  # fmt: skip
    else:
        request = GENERATING[kind](model="base", lora_ext={}, vllm_xargs={"lora_ext": "{}"})
    answer = asyncio.run(BaseServing(models, models.engine.model_config)._check_model(request))
    place = "extra_args" if kind == "tokens" else "vllm_xargs"
    assert answer.error.type == "bad_value" and place in answer.error.message


@pytest.mark.parametrize("kind", ["chat", "responses", "messages"])
def test_the_last_message_is_the_instruction(models, kind):
    models.engine.vllm_config.model_config.get_vocab_size = lambda: 256
    _, adapter, _ = send(models, GENERATING[kind](model="wavllm"))
    assert Recipe.parse(adapter.lora_path).gate
    assert models.engine.core.gates == [tuple(map(ord, '"last"'))]
    send(models, GENERATING[kind](model="wavllm", lora_ext={"instruction": {"ids": [9]}}))
    assert models.engine.core.gates[1:] == [(9,)]


def test_an_unloaded_model_is_no_name(models):
    del models.lora_requests["a"]
    server = BaseServing(models, models.engine.model_config)
    answer = asyncio.run(server._check_model(GENERATING["chat"](model="base", lora_ext=BOTH)))
    assert "lora_ext.adapters[1].name is no loaded adapter; seen: a" in answer.error.message


@pytest.mark.parametrize(
    ("prompt", "said", "seen"),
    [
        ({"prompt_token_ids": [5, 6, 7]}, {"modality_spans": IMAGE}, "bad_value"),
        ({"prompt_embeds": torch.zeros(3, 8)}, {"modality_spans": IMAGE}, "bad_value"),
        (
            {"prompt_token_ids": [5] * 9, "mm_placeholders": {"image": []}},
            {"modality_spans": IMAGE},
            "bad_value",
        ),
        ({"prompt_token_ids": [5, 6, 7]}, {"trace": True}, "not_traced"),
        ({"prompt_token_ids": [5, 6, 7, 8]}, {"modality_spans": IMAGE}, None),
        ({"encoder_prompt": {}}, {"modality_spans": IMAGE}, None),
    ],
)
@pytest.mark.parametrize("by", ANSWERING)
def test_what_the_prompt_shows_to_be_wrong_is_found_before_a_stream(models, by, prompt, said, seen):
    """None of the generators is asked for a first answer here."""
    request = CompletionRequest(prompt="hi", model="mm", lora_ext=said)
    server = BaseServing(models, models.engine.model_config)
    assert asyncio.run(server._check_model(request)) is None
    given = server._maybe_get_adapters(request)
    code = None
    try:
        ANSWERING[by](models.engine, prompt, given)
    except RefusedRequest as error:
        code = error.code
    assert code == seen
