"""An `AdapterError` as vLLM's front ends understand it, and as an HTTP answer.

Targets: `OutputProcessor.process_outputs`, where a request that the engine core refused ends. Stock
answers it with 500, whatever the reason, and a pooling request ends the front end. And what makes
an answer of an error, which names all of a status alike: the server's handler of a `ValueError`,
which ours are, `create_error_response` of streams that have begun, and of Anthropic's route. What
else is raised may name files of the server: its text goes into the log, and without them out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any

import vllm.entrypoints.anthropic.api_router as anthropic
import vllm.entrypoints.serve.engine.serving as serving
import vllm.entrypoints.serve.exception_handling.register as handlers
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger
from vllm.outputs import RequestError
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import EMPTY_CPU_TENSOR, OutputProcessor

from vllm_lora_ext.adapters.paths import without_paths
from vllm_lora_ext.conditions.said import FIELD
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import metrics
from vllm_lora_ext.model_patches.admitted import Admitted

logger = init_logger(f"vllm.{__name__}")

_STATUS = {
    "not_found": HTTPStatus.NOT_FOUND,
    "path_not_allowed": HTTPStatus.FORBIDDEN,
    "id_in_use": HTTPStatus.CONFLICT,
    "adapter_changed": HTTPStatus.CONFLICT,
    "files_changed": HTTPStatus.CONFLICT,
    "version_conflict": HTTPStatus.CONFLICT,
    "no_token": HTTPStatus.UNAUTHORIZED,
    "wrong_token": HTTPStatus.FORBIDDEN,
    "slots_pinned": HTTPStatus.CONFLICT,
    "host_cache_full": HTTPStatus.CONFLICT,
    "device_memory_full": HTTPStatus.CONFLICT,
    "merge_busy": HTTPStatus.TOO_MANY_REQUESTS,
    "merge_failed": HTTPStatus.INTERNAL_SERVER_ERROR,
    "load_failed": HTTPStatus.INTERNAL_SERVER_ERROR,
    "ranks_differ": HTTPStatus.INTERNAL_SERVER_ERROR,
    "engine_dead": HTTPStatus.SERVICE_UNAVAILABLE,
}


def status_of(code: str) -> HTTPStatus:
    """The HTTP status of an error's code: 400 but for a few."""
    return _STATUS.get(code, HTTPStatus.BAD_REQUEST)


def engine_dead() -> AdapterError:
    """For a call that no engine is there to answer any more."""
    return AdapterError(
        "engine_dead", "the engine has ended, and the server ends too",
        fix="ask another replica; the server's log says why",
    )  # fmt: skip


class RefusedRequest(AdapterError, GracefulHTTPError):
    """Ends one request with the status of its code; any other error of `AsyncLLM` becomes 500."""

    def __init__(self, error: AdapterError) -> None:
        Exception.__init__(self, str(error))
        self.code, self.message, self.text = error.code, error.message, error.text
        self.http_status = status_of(error.code)
        metrics.refused(error.code)


def to_response(error: AdapterError, param: str | None = "lora_path") -> ErrorResponse:
    """The error as an OpenAI-style body: `type` is the stable code."""
    if not isinstance(error, RefusedRequest):  # which was counted when it was made
        metrics.refused(error.code)
    return create_error_response(
        message=error.text, err_type=error.code, status_code=status_of(error.code), param=param
    )


def hide_paths(answer: ErrorResponse, sent: Collection[str] = ()) -> ErrorResponse:
    """An answer that others have made, without paths of the server in its text.

    Args:
        sent: paths that the client has named.
    """
    said = answer.error.message
    answer.error.message = without_paths(said, sent)
    if answer.error.message != said:
        logger.warning("Answered without its paths: %s", said)
    return answer


def _untyped(error: object) -> bool:
    """Whether nobody has written its text for clients, as for vLLM's own kinds and ours."""
    typed = isinstance(error, AdapterError) or type(error).__module__.startswith("vllm.")
    return isinstance(error, Exception) and not typed


def _answer(error: RefusedRequest) -> ErrorResponse:
    return to_response(error, FIELD if error.code == "bad_value" else None)


def _typed(stock: Callable[..., ErrorResponse]) -> Callable[..., ErrorResponse]:
    """`create_error_response` that knows our errors."""

    @functools.wraps(stock)
    def typed(message: Any, *args: Any, **kwargs: Any) -> ErrorResponse:
        if isinstance(message, RefusedRequest):
            return _answer(message)
        answer = stock(message, *args, **kwargs)
        return hide_paths(answer) if _untyped(message) else answer

    return typed


def _error_of(output: EngineCoreOutput) -> AdapterError | None:
    if output.finish_reason is not FinishReason.ERROR or not isinstance(output.stop_reason, str):
        return None
    return AdapterError.parse(output.stop_reason)


def _end(processor: Any, output: EngineCoreOutput, error: AdapterError) -> list[Any]:
    """Ends the request: the error where a caller waits, else an output that says why."""
    state = processor.request_states.get(output.request_id)
    if state is None:  # aborted
        return []
    admitted: Admitted | None = getattr(processor, "_lora_ext_admitted", None)
    if admitted is not None and state.lora_request is not None:
        admitted.doubt(state.lora_request.lora_int_id)
    pooling = state.detokenizer is None
    last = state.make_request_output(
        [], EMPTY_CPU_TENSOR if pooling else None, FinishReason.ERROR, str(error),
        error=RequestError(error.code, error.text) if pooling else None,
    )  # fmt: skip
    processor._finish_request(state)
    processor.lora_states.request_finished(state.request_id, state.lora_name)
    if state.queue is None:
        return [] if last is None else [last]
    state.queue.put(RefusedRequest(error))
    return []


def apply() -> None:
    """Wraps what turns the core's outputs into answers, and errors into answers of a server."""
    stock, stock_handler = OutputProcessor.process_outputs, handlers.exception_handler

    @functools.wraps(stock)
    def new_process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = ((o.request_id, _error_of(o)) for o in engine_core_outputs)
        errors = {request_id: error for request_id, error in found if error is not None}
        if not errors:
            return stock(self, engine_core_outputs, *args, **kwargs)
        others = [o for o in engine_core_outputs if o.request_id not in errors]
        done = stock(self, others, *args, **kwargs)
        for output in engine_core_outputs:
            if output.request_id in errors:
                done.request_outputs += _end(self, output, errors[output.request_id])
        return done

    @functools.wraps(stock_handler)
    async def new_handler(req: Any, exc: Exception) -> Any:
        if isinstance(exc, RefusedRequest):
            answer = _answer(exc)
        else:
            given = await stock_handler(req, exc)
            if not _untyped(exc):
                return given
            answer = hide_paths(ErrorResponse.model_validate(json.loads(given.body)))
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)

    OutputProcessor.process_outputs = new_process_outputs
    handlers.exception_handler = new_handler
    for module in (anthropic, serving):
        module.create_error_response = _typed(module.create_error_response)
