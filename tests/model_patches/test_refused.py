"""How a request that the core refused ends in vLLM's own output processor."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.entrypoints.anthropic.api_router as anthropic
import vllm.entrypoints.serve.exception_handling.register as register
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import PoolingParams, SamplingParams
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from vllm_lora_ext import plugin
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.refused import RefusedRequest

plugin.register()
ERROR = AdapterError("slots_pinned", "all pinned")


def request(key: str, pooling: bool, n: int = 1) -> EngineCoreRequest:
    params = SamplingParams(max_tokens=3, n=n, detokenize=False)
    return EngineCoreRequest(
        key, [1, 2, 3], None, None if pooling else params,
        PoolingParams(task="embed") if pooling else None, 0.0, LoRARequest("a", 1, "/a"), None,
        None, external_req_id=key,
    )  # fmt: skip


def refused(key: str) -> EngineCoreOutput:
    return EngineCoreOutput(key, [], finish_reason=FinishReason.ERROR, stop_reason=str(ERROR))


@pytest.fixture(params=[False, True], ids=["generate", "pooling"])
def pooling(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_waiting_caller_gets_the_typed_error(pooling):
    processor = OutputProcessor(None, log_stats=False)
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "r")
    processor.add_request(request("r", pooling), None, queue=queue)
    done = processor.process_outputs([refused("r")])
    assert done.request_outputs == [] and done.reqs_to_abort == []
    with pytest.raises(RefusedRequest) as caught:
        asyncio.run(queue.get())
    assert (caught.value.code, caught.value.http_status) == ("slots_pinned", 409)
    assert not processor.has_unfinished_requests()


def test_an_offline_caller_gets_an_output_that_says_why(pooling):
    processor = OutputProcessor(None, log_stats=False)
    processor.add_request(request("r", pooling), None)
    (output,) = processor.process_outputs([refused("r")]).request_outputs
    assert output.finished and output.request_id == "r"
    if pooling:
        assert output.error.code == "slots_pinned"
    else:
        assert output.outputs[0].finish_reason == "error"
        assert AdapterError.parse(output.outputs[0].stop_reason).code == "slots_pinned"
    assert not processor.has_unfinished_requests()


def test_its_neighbours_go_on():
    processor = OutputProcessor(None, log_stats=False)
    for key in ("a", "b", "c"):
        processor.add_request(request(key, False), None)
    outputs = [EngineCoreOutput("a", [5]), refused("b"), EngineCoreOutput("c", [6])]
    done: Any = processor.process_outputs(outputs)
    assert [o.request_id for o in done.request_outputs] == ["a", "c", "b"]
    assert set(processor.request_states) == {"a", "c"}
    assert processor.process_outputs([refused("b")]).request_outputs == []  # aborted meanwhile


def test_stocks_own_errors_are_stocks():
    processor = OutputProcessor(None, log_stats=False)
    processor.add_request(request("r", False), None)
    output = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR)
    (output,) = processor.process_outputs([output]).request_outputs
    assert output.outputs[0].stop_reason is None


def test_all_choices_of_a_request_end():
    processor = OutputProcessor(None, log_stats=False)
    parent = ParentRequest(request("r", False, n=2))
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "r")
    keys = []
    for index in range(2):
        key, params = parent.get_child_info(index)
        child = request(key, False)
        child.sampling_params, child.external_req_id = params, "r"
        processor.add_request(child, None, parent, index, queue)
        keys.append(key)
    processor.process_outputs([refused(keys[0])])
    with pytest.raises(RefusedRequest):
        asyncio.run(queue.get())
    processor.process_outputs([refused(keys[1])])
    assert not processor.has_unfinished_requests() and not processor.parent_requests


@pytest.mark.parametrize(
    "create", [BaseServing.create_error_response, anthropic.create_error_response]
)
def test_streams_and_anthropics_route_name_the_code_too(create: Any) -> None:
    error = create(RefusedRequest(AdapterError("adapter_changed", "it went"))).error
    assert (error.type, error.code, error.message) == ("adapter_changed", 409, "it went.")
    assert create(ValueError("no")).error.type == "BadRequestError"


@pytest.mark.parametrize(
    ("code", "status", "param"), [("bad_value", 400, "lora_ext"), ("not_found", 404, None)]
)
def test_a_server_answers_with_the_stable_code(code: str, status: int, param: str | None) -> None:
    app = FastAPI()
    register.init_exception_handler(app)

    @app.get("/")
    async def route() -> None:
        raise RefusedRequest(AdapterError(code, "it cannot be", fix="leave it"))

    answer = TestClient(app).get("/")
    want = {"message": "it cannot be; fix: leave it.", "type": code, "param": param, "code": status}
    assert (answer.status_code, answer.json()) == (status, {"error": want})


PLACES = ("/data/adapters/secret/adapter_config.json", "/data/with blanks/x", "/scratch0/store")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [PermissionError, RuntimeError, ValueError])
def test_what_nobody_has_typed_leaves_no_path_of_the_server(place: str, kind: type) -> None:
    """Whether it is raised in a route of ours, in a hook, or after a stream has begun."""
    app = FastAPI()
    register.init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    raised = kind(13, "Permission denied", place) if kind is PermissionError else kind(
        f"cannot open '{place}' for /v1/completions"
    )  # fmt: skip

    @app.get("/")
    async def route() -> None:
        raise raised

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert answer.status_code == (400 if kind is ValueError else 500)
    streamed = BaseServing.create_error_response(raised).model_dump()
    for said in (answer.json(), streamed):
        message = said["error"]["message"]
        assert "'<path>'" in message and "data" not in message and "scratch" not in message
        assert kind is PermissionError or message.endswith("for /v1/completions")


def test_what_vllm_says_itself_stays_as_it_is() -> None:
    said = "set --media-path /data/x"
    assert BaseServing.create_error_response(said).error.message == said
    error = VLLMValidationError(said, parameter="model")
    assert BaseServing.create_error_response(error).error.message.startswith(said)
