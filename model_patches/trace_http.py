"""How a request asks for its trace, and the route that gives it out.

Targets: `InputProcessor.process_inputs`, which every request passes, and
`attach_endpoint_plugins`, which hands the API server's app to plugins. The worker's side is in
`trace`, and runs only where the setting `trace` is on.
"""

from __future__ import annotations

import functools
import sys
from hashlib import sha256
from typing import Any

import vllm.plugins.endpoint_plugins.interface as plugins
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from vllm.v1.engine.input_processor import InputProcessor

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.exchange import current
from vllm_lora_ext.model_patches.refused import RefusedRequest, status_of
from vllm_lora_ext.model_patches.request_settled import check_prompt, extras_of
from vllm_lora_ext.trace.client import PATH
from vllm_lora_ext.trace.fetch import OWNER, RPC, check_on, read_answers, wanted

_LAUNCHER = "vllm.entrypoints.launchers.app"


async def get_trace(
    request_id: str, http: Request, prompt: int = Query(0, ge=0), choice: int = Query(0, ge=0)
) -> Response:
    """The trace of a request, by the `id` of its answer.

    Args:
        prompt: which of the request's prompts, from 0.
        choice: which of its `n` choices for that prompt.
    """
    engine = http.app.state.engine_client
    try:
        check_on(engine.vllm_config.additional_config)
        answers = await engine.collective_rpc(RPC, args=(request_id, prompt, choice, _client()))
        text = read_answers(answers).to_json()
    except AdapterError as error:
        status = status_of(error.code).value
        body = {"message": error.text, "type": error.code, "param": "request_id", "code": status}
        return JSONResponse({"error": body}, status)
    return Response(text, media_type="application/json")


def _client() -> str:
    """Who asks, as far as a server knows: the holder of a key. Clients without one are one."""
    exchange = current()
    key = "" if exchange is None else exchange.headers.get("authorization", "")
    return sha256(key.encode()).hexdigest() if key else ""


def _check(request: Any, vllm_config: Any) -> None:
    """Holds what a request says against its prompt. One that asks for a trace is computed whole: a
    token whose KV comes out of the prefix cache is not computed, so its gates are not."""
    params = request.sampling_params  # a copy of the caller's
    try:
        check_prompt(request)
        if params is not None and wanted(params.extra_args):
            check_on(vllm_config.additional_config)
            params.skip_reading_prefix_cache = True
            params.extra_args = {**params.extra_args, OWNER: _client()}
    except AdapterError as error:
        raise RefusedRequest(error) from None


def apply() -> None:
    """Wraps both."""
    process_inputs, attach = InputProcessor.process_inputs, plugins.attach_endpoint_plugins

    @functools.wraps(process_inputs)
    def new_process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        if extras_of(request.params):
            _check(request, self.vllm_config)
        return request

    @functools.wraps(attach)
    def new_attach(app: FastAPI, *args: Any, **kwargs: Any) -> None:
        attach(app, *args, **kwargs)
        app.add_api_route(f"{PATH}{{request_id}}", get_trace, methods=["GET"])

    InputProcessor.process_inputs = new_process_inputs
    plugins.attach_endpoint_plugins = new_attach
    launcher: Any = sys.modules.get(_LAUNCHER)
    if launcher is not None:  # holds the function by name
        launcher.attach_endpoint_plugins = new_attach
