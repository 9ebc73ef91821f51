"""Reward models of a pooling server: one request, the passes of all experts, one answer.

Target: `attach_endpoint_plugins`, which hands the API server's app to plugins. The experts are
adapters like others: each of their passes is a request of the engine, and shares its batches.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any
from uuid import uuid4

import torch
import vllm.plugins.endpoint_plugins.interface as plugins
from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, TypeAdapter
from vllm import PoolingParams
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_lora_ext.adapters.dmoerm import read_reward_model
from vllm_lora_ext.conditions.checked import Text, checked
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.refused import to_response
from vllm_lora_ext.serving.rewards import Bounds, Judge, Pass, Reward
from vllm_lora_ext.settings import LoraExtSettings

PATH = "/v1/lora_ext/reward"
TASK = "embed"
_LAUNCHER = "vllm.entrypoints.launchers.app"

logger = init_logger(f"vllm.{__name__}")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    input: dict[str, Any] | list[Any]


_REQUEST = TypeAdapter(_Request)


def params() -> PoolingParams:
    """Of an expert's pass: the last hidden state as it is, not normalised."""
    return PoolingParams(task=TASK, use_activation=False)


def bounds_of(model_config: Any) -> Bounds:
    """What an engine reads."""
    return Bounds(model_config.max_model_len, model_config.get_vocab_size())


def check_pooling(model_config: Any, task: str | None) -> None:
    """Raises AdapterError `bad_settings` where an engine does not answer with the last hidden
    state of a prompt.

    Args:
        task: what it pools for; None: it does not pool.
    """
    pooler = getattr(model_config.pooler_config, "seq_pooling_type", None)
    if task != TASK or pooler != "LAST":
        raise AdapterError(
            "bad_settings", "the experts of a reward model need the last hidden state of a prompt,"
            " and this engine gives another thing", seen=f"{task or 'generate'}, {pooler}",
            limit=f"{TASK}, LAST",
            fix="start it with --runner pooling --convert embed --pooler-config"
            ' \'{"seq_pooling_type": "LAST"}\'',
        )  # fmt: skip


class Rewards:
    """The reward models of one server.

    Raises:
        AdapterError: one of them cannot be read, or is none for the served base model.
    """

    def __init__(self, engine: Any, settings: LoraExtSettings) -> None:
        self._engine, config = engine, engine.vllm_config.model_config
        self._judges: dict[str, Judge] = {}
        reward, roots = settings.reward, settings.readable_roots()
        for name, folder in ({} if reward is None else reward.models).items():
            assert reward is not None
            adapter = read_reward_model(folder, roots=roots)
            self._judges[name] = Judge(
                adapter, config.model, reward.router_device, bounds_of(config)
            )
            logger.info("Reward model %s: %s", name, adapter.one_base_note() or "one base model")
        self._loaded: dict[str, dict[tuple[str, int], LoRARequest]] = {}
        self._loading = asyncio.Lock()

    @classmethod
    def of(cls, engine: Any) -> Rewards:
        """Those of an `AsyncLLM`, made when first asked for."""
        if not hasattr(engine, "_lora_ext_rewards"):
            additional = engine.vllm_config.additional_config
            settings = LoraExtSettings.from_additional_config(additional)
            engine._lora_ext_rewards = cls(engine, settings)
        return engine._lora_ext_rewards

    async def score(self, model: str, values: Sequence[object], request_id: str) -> list[Reward]:
        """Texts by a reward model.

        Raises:
            AdapterError: `not_found`, there is no such model; a text is malformed; the experts do
                not fit the engine.
        """
        judge = self._judges.get(model)
        if judge is None:
            raise AdapterError(
                "not_found", "there is no reward model of that name", seen=model,
                limit=sorted(self._judges) or "none", fix="name it in the setting reward.models",
            )  # fmt: skip
        readings = [judge.read(value, f"input[{i}]") for i, value in enumerate(values)]
        loras = await self._experts(model, judge)
        probs_TC = await asyncio.to_thread(judge.route, readings)
        passes = judge.passes(readings, probs_TC)
        hidden = await self._run(passes, loras, request_id)
        return judge.rewards(probs_TC, passes, hidden)

    async def _experts(self, model: str, judge: Judge) -> dict[tuple[str, int], LoRARequest]:
        async with self._loading:
            if model not in self._loaded:
                engine, config = self._engine, self._engine.vllm_config.model_config
                tasks = await engine.get_supported_tasks()
                pools = config.runner_type == "pooling"
                check_pooling(config, config.get_pooling_task(tasks) if pools else None)
                self._loaded[model] = {
                    (category, number): await engine.add_adapter(
                        f"{model}/{category}/{expert.point}", expert.tensors, expert.config
                    )
                    for category, number, expert in judge.each_expert()
                }
            return self._loaded[model]

    async def _run(
        self, passes: Sequence[Pass], loras: dict[tuple[str, int], LoRARequest], request_id: str
    ) -> list[torch.Tensor]:
        """Hidden states of all passes, which are on their way at the same time."""
        tasks = [
            asyncio.create_task(
                self._pass(one, loras[one.category, one.number], f"{request_id}-{i}")
            )
            for i, one in enumerate(passes)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _pass(self, one: Pass, lora: LoRARequest, request_id: str) -> torch.Tensor:
        prompt = tokens_input(one.ids)
        outputs = self._engine.encode(prompt, params(), request_id, lora_request=lora)
        *_, last = [output async for output in outputs]
        return last.outputs.data


@with_cancellation
async def post_reward(body: Annotated[Any, Body()], raw_request: Request) -> Response:
    """Rewards of texts: `{"model": NAME, "input": TEXT or [TEXT, ...]}`, a text being
    `{"router_ids": [...], "inner_ids": [...]}` or `{"messages": [...]}`."""
    request_id = f"reward-{uuid4().hex}"
    try:
        asked = checked(_REQUEST, body, "body", 'send {"model": NAME, "input": [...]}')
        values = asked.input if isinstance(asked.input, list) else [asked.input]
        if not values:
            raise AdapterError("bad_value", "body.input holds no text", fix="send one or more")
        found = await Rewards.of(raw_request.app.state.engine_client).score(
            asked.model, values, request_id
        )
    except AdapterError as error:
        refused = to_response(error, "input")
        return JSONResponse(refused.model_dump(), refused.error.code)
    data = [{"index": i, "object": "reward", **asdict(reward)} for i, reward in enumerate(found)]
    return JSONResponse({"id": request_id, "object": "list", "model": asked.model, "data": data})


def apply() -> None:
    """Wraps what gives routes to the app."""
    attach = plugins.attach_endpoint_plugins

    @functools.wraps(attach)
    def new_attach(app: FastAPI, *args: Any, **kwargs: Any) -> None:
        attach(app, *args, **kwargs)
        app.add_api_route(PATH, post_reward, methods=["POST"])

    plugins.attach_endpoint_plugins = new_attach
    launcher: Any = sys.modules.get(_LAUNCHER)
    if launcher is not None:  # holds the function by name
        launcher.attach_endpoint_plugins = new_attach
