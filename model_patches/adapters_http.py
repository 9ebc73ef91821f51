"""Routes and middleware that the plugin adds to the server's app.

Targets: `attach_endpoint_plugins`, which hands the app to plugins, and the models of the bodies
that load and unload, which learn `expected_version`. `GET /v1/lora_ext/adapters` says what is
loaded, `POST /v1/lora_ext/rollback` has an adapter's name answer as an older version, and whoever
reads `/metrics` has the engine core asked for its numbers first.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import Any

import vllm.entrypoints.serve.lora.api_router as lora_routes
import vllm.plugins.endpoint_plugins.interface as plugins
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.logger import init_logger

from vllm_lora_ext.model_patches import data_parallel, engine_metrics
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.core_calls import STATE
from vllm_lora_ext.model_patches.exchange import Exchanges

logger = init_logger(f"vllm.{__name__}")
ADAPTERS, ROLLBACK = "/v1/lora_ext/adapters", "/v1/lora_ext/rollback"

_LAUNCHER = "vllm.entrypoints.launchers.app"
_SCRAPE_S = 2.0  # the core answers between two steps


class LoadRequest(LoadLoRAAdapterRequest):
    """Stock's body of the load route, and what may be replaced by it."""

    expected_version: str | None = None


class UnloadRequest(UnloadLoRAAdapterRequest):
    """Stock's body of the unload route, and what alone may be taken away by it."""

    expected_version: str | None = None


class RollbackRequest(BaseModel, extra="forbid"):
    """The body of the rollback route."""

    lora_name: str
    version: str
    expected_version: str | None = None


async def state(engine: Any, count: bool = False) -> dict[str, Any]:
    """What the engine cores hold (`CoreAdapters.state`)."""
    return data_parallel.whole(await data_parallel.ask(engine.engine_core, STATE, count))


async def list_adapters(http: Request) -> Response:
    """Every adapter that the server answers for, by name."""
    models, engine = http.app.state.openai_serving_models, http.app.state.engine_client
    if engine.vllm_config.lora_config is None:
        return JSONResponse({"object": "list", "data": []})
    held = {row["id"]: row for row in (await state(engine))["adapters"]}
    rows = [
        _row(name, held.get(lora.lora_int_id), Admitted.of(engine).version(lora.lora_int_id))
        for name, lora in models.lora_requests.items()
    ]
    return JSONResponse({"object": "list", "data": rows})


def _row(name: str, held: dict[str, Any] | None, version: str) -> dict[str, Any]:
    if held is None:  # the core does not know it: read for its next request
        return {"name": name, "version": version, "residency": "none", "in_flight": 0,
                "pinned": False, "older": []}  # fmt: skip
    return {**{key: value for key, value in held.items() if key != "id"}, "name": name}


async def roll_back(body: RollbackRequest, http: Request) -> Response:
    """Has new requests for an adapter get an older version that is still held."""
    front = http.app.state.openai_serving_models._lora_ext_front
    answer = await front.roll_back(body.lora_name, body.version, body.expected_version)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), answer.error.code)
    return Response(answer)


class Scrapes:
    """ASGI middleware: numbers of the engine core are asked for when somebody reads them."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await _refresh(getattr(scope["app"].state, "engine_client", None))
        await self._app(scope, receive, send)


async def _refresh(engine: Any) -> None:
    if engine is None or engine.vllm_config.lora_config is None:
        return
    asked: asyncio.Task[None] | None = getattr(engine, "_lora_ext_asked", None)
    if asked is None or asked.done():
        asked = engine._lora_ext_asked = asyncio.create_task(_ask(engine))
    try:  # what the core has counted, it says once: nobody's hurry may lose the answer
        await asyncio.wait_for(asyncio.shield(asked), _SCRAPE_S)
    except TimeoutError:
        logger.warning("The engine core's numbers of adapters are old: it is busy")


async def _ask(engine: Any) -> None:
    try:
        engine_metrics.show(await state(engine, count=True))
    except Exception as error:  # a scrape must not fail for it
        logger.warning("The engine core's numbers of adapters are old: %r", error)


def apply() -> None:
    """Wraps what hands out the app."""
    attach = plugins.attach_endpoint_plugins

    @functools.wraps(attach)
    def new_attach(app: FastAPI, *args: Any, **kwargs: Any) -> None:
        attach(app, *args, **kwargs)
        app.add_api_route(ADAPTERS, list_adapters, methods=["GET"])
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:  # as the routes that load
            app.add_api_route(ROLLBACK, roll_back, methods=["POST"])
        app.add_middleware(Scrapes)
        app.add_middleware(Exchanges)

    plugins.attach_endpoint_plugins = new_attach
    lora_routes.LoadLoRAAdapterRequest = LoadRequest
    lora_routes.UnloadLoRAAdapterRequest = UnloadRequest
    launcher: Any = sys.modules.get(_LAUNCHER)
    if launcher is not None:  # holds the function by name
        launcher.attach_endpoint_plugins = new_attach
