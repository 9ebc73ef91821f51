"""A fleet: several `vllm serve` under Ray Serve, adapters on demand out of one shared folder.

    pip install "ray[serve]==2.60.0"
    python examples/ray_serve/fleet.py BASE ADAPTERS --replicas 2 --port 8000

Each replica is one `vllm serve`, which the replica starts, watches and ends. A request names an
adapter by its folder's name below ADAPTERS (plain, routed, any format), or a mix of them
(`cat:math*0.6+code*0.4`). Ray Serve's model multiplexing sends it to a replica that holds it, and
has the least used replica load it when none does. What a replica that dies had in hand is asked
again of another one.

Ray Serve LLM has all of this ready made, but `ray[llm]` 2.60 wants vLLM 0.29.0 and NVIDIA's
wheels; so vLLM's own server stands here in the place of its engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving.mix_name import is_mix_name, parse

TRIES, PAUSE_S = 8, 1.0  # a replica that died is there again in half a minute
READY_S, ANSWER_S = 480, 300
HELD = 64  # adapters that Ray Serve lets one replica hold; vLLM's own limit is in bytes
PASSED_ON = ("content-type", "x-lora-ext-version")
# Runs a command; when that ends, or who holds the other end of stdin, all of its processes end.
WATCH = """
import os, signal, subprocess, sys, threading
def end(): os.killpg(0, signal.SIGKILL)
threading.Thread(target=lambda: (sys.stdin.read(), end()), daemon=True).start()
subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
end()
"""


@dataclass(frozen=True)
class Fleet:
    """What all replicas are.

    Args:
        base: the base model's folder; adapters: the folder of adapters' folders.
        flags: more of `vllm serve`.
    """

    base: str
    adapters: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A server's answer, with the replica that gave it."""

    status: int
    content: bytes
    headers: dict[str, str]
    replica: str


class Refused(Exception):
    """The server does not load an adapter.

    Args:
        answer: what it says.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.content)
        self.answer = answer


class ServerLost(RuntimeError):
    """The replica's server is gone, and with it the request: ask another one."""


@serve.deployment(
    max_ongoing_requests=64, health_check_period_s=1, health_check_timeout_s=10,
    ray_actor_options={"num_cpus": 0},
)  # fmt: skip
class Replica:
    """One `vllm serve` on loopback."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, port = fleet, _free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._server = subprocess.Popen(
            [sys.executable, "-c", WATCH, *_command(fleet, port)], stdin=subprocess.PIPE,
            start_new_session=True, env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        )  # fmt: skip
        self._name = serve.get_replica_context().replica_id.unique_id
        self._client = httpx.AsyncClient(base_url=self._url, timeout=ANSWER_S, trust_env=False)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._server.poll() is None:
            try:
                if httpx.get(f"{self._url}/health", timeout=2, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.3)
        self._end()
        raise ServerLost(f"vllm serve did not come up: {self._server.returncode}")

    def check_health(self) -> None:
        """Ray Serve puts another replica in the place of one that fails this."""
        if self._server.poll() is not None:
            raise ServerLost(f"vllm serve ended with {self._server.returncode}")

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    @serve.multiplexed(max_num_models_per_replica=HELD)
    async def hold(self, model: str) -> Held:
        """Has the server load what a model's name needs; Ray Serve calls it once a model, and its
        router learns from it who holds what."""
        await self._load(model)
        return Held(self._url, model)

    async def _load(self, model: str) -> None:
        """Loads an adapter, or all that are in a mix."""
        mix = is_mix_name(model)
        for name in [name for name, _ in parse(model).terms] if mix else [model]:
            body = {"lora_name": name, "lora_path": name}  # below `adapter_roots`, or refused
            answer = await self._post("/v1/load_lora_adapter", body)
            if answer.is_error and "already been loaded" not in answer.text:
                raise Refused(_kept(answer, self._name))

    async def ask(self, path: str, body: dict[str, Any]) -> Answer:
        """A request's answer, whatever its status.

        Raises:
            ServerLost: it may be asked of another replica.
        """
        model = serve.get_multiplexed_model_id()
        try:
            if model:
                await self.hold(model)
            answer = await self._post(path, body)
            if answer.status_code == 404 and model:  # let go of between these two lines
                await self._load(model)
                answer = await self._post(path, body)
        except Refused as refused:
            return refused.answer
        except AdapterError as error:  # no name of a mix
            return Answer(400, _message(400, str(error)), {}, self._name)
        if answer.status_code >= 500:  # an engine that is dying says so
            raise ServerLost(f"{answer.status_code}: {answer.text[:200]}")
        return _kept(answer, self._name)

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise ServerLost(str(error) or type(error).__name__) from None


class Held:
    """An adapter that a replica holds; unloaded when Ray Serve lets go of it."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name, self._gone = url, name, False

    def __del__(self) -> None:
        if self._gone:  # Ray Serve calls this, and then Python does
            return
        self._gone = True
        body = {"lora_name": self._name}
        with contextlib.suppress(httpx.TransportError):  # then nothing holds it any more
            httpx.post(f"{self._url}/v1/unload_lora_adapter", json=body, trust_env=False)


app = FastAPI()


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Gateway:
    """The OpenAI routes: picks the replica by the model's name, and asks again when one dies."""

    def __init__(self, replicas: Any, fleet: Fleet) -> None:
        self._replicas, self._fleet = replicas, fleet

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._answer("/v1/completions", await request.json())

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._answer("/v1/chat/completions", await request.json())

    @app.get("/v1/models")
    async def models(self) -> Any:
        """The base model and every folder, loaded or not: what a request may name."""
        folders = [f.name for f in Path(self._fleet.adapters).iterdir() if f.is_dir()]
        names = ["base", *sorted(folders)]
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    async def _answer(self, path: str, body: dict[str, Any]) -> Response:
        if body.get("stream"):
            return _error(400, "this gateway answers whole: a stream cannot be asked again")
        model = str(body.get("model", "base"))
        handle = self._replicas.options(multiplexed_model_id="" if model == "base" else model)
        lost = "nobody was asked"
        for tries in range(1, TRIES + 1):
            try:
                answer = await handle.ask.remote(path, body)
            except (RayError, RayServeException) as error:  # `ServerLost`, or all of the replica
                lost = str(error).splitlines()[-1]
                await asyncio.sleep(PAUSE_S * tries)
                continue
            headers = {**answer.headers, "x-replica": answer.replica, "x-tries": str(tries)}
            return Response(answer.content, answer.status, headers)
        return _error(503, f"no replica has answered: {lost}")


def _kept(answer: httpx.Response, replica: str) -> Answer:
    headers = {name: value for name, value in answer.headers.items() if name in PASSED_ON}
    return Answer(answer.status_code, answer.content, headers, replica)


def _error(status: int, message: str) -> Response:
    return Response(_message(status, message), status, media_type="application/json")


def _message(status: int, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": status}}).encode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(fleet: Fleet, port: int) -> list[str]:
    beside = Path(sys.executable).parent / "vllm"
    settings = {"lora_ext": {"adapter_roots": [fleet.adapters], "merge": {}}}
    return [
        str(beside) if beside.is_file() else shutil.which("vllm") or "vllm",
        "serve", fleet.base, "--served-model-name", "base", "--host", "127.0.0.1",
        "--port", str(port), "--enable-lora", "--additional-config", json.dumps(settings),
        *fleet.flags,
    ]  # fmt: skip


def build(fleet: Fleet, replicas: int) -> Any:
    """The application for `serve.run`."""
    bound = Replica.options(num_replicas=replicas).bind(fleet)
    return Gateway.bind(bound, fleet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="the base model's folder")
    parser.add_argument("adapters", help="the folder of adapters' folders")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", default="local", help="of a Ray cluster")
    args, flags = parser.parse_known_args()  # the rest is vllm serve's
    ray.init(args.address, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    fleet = Fleet(args.base, str(Path(args.adapters).resolve()), tuple(flags))
    serve.run(build(fleet, args.replicas), blocking=True)


if __name__ == "__main__":
    main()
