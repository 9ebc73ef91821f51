"""What one client says to a server over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(120)
VERSION = "x-lora-ext-version"


@dataclass(frozen=True)
class Question:
    """What is computed, greedily. `says`: the field `lora_ext` of the request."""

    model: str
    prompt: tuple[int, ...]
    says: dict[str, Any] | None = field(default=None, hash=False)

    def body(self, n: int) -> dict[str, Any]:
        said = {"lora_ext": self.says} if self.says else {}
        return {
            "model": self.model, "prompt": list(self.prompt), "max_tokens": n, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **said,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came back. `code`: of an error; `sure`: tokens before the first near tie."""

    status: int
    tokens: tuple[int, ...] = ()
    version: str = ""
    code: str = ""
    text: str = ""
    sure: int = 0

    @property
    def ok(self) -> bool:
        return self.status == 200


class Api:
    """One client's connections."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def ask(self, question: Question, n: int, patience: float | None = None) -> Answer | None:
        """The whole answer; None: not within `patience` seconds, and the client has hung up."""
        timeout = TIMEOUT if patience is None else httpx.Timeout(120, read=patience)
        body = question.body(n) | ({"logprobs": 2} if patience is None else {})
        try:
            got = self._http.post("/v1/completions", json=body, timeout=timeout)
        except httpx.ReadTimeout:
            return None
        return _answer(got)

    def stream(self, question: Question, n: int) -> Iterator[Answer]:
        """The answer so far, after each event; a refusal is the first and the last."""
        body = question.body(n) | {"stream": True}
        with self._http.stream("POST", "/v1/completions", json=body) as stream:
            if stream.status_code != 200:
                stream.read()
                yield _answer(stream)
                return
            tokens: list[int] = []
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    yield _refused(int(event["error"]["code"]), event, line)
                    return
                tokens += event["choices"][0].get("token_ids") or []
                yield Answer(200, tuple(tokens), stream.headers.get(VERSION, ""))

    def post(self, route: str, **body: Any) -> Answer:
        """A route that changes what is loaded."""
        return _answer(self._http.post(f"/v1/{route}", json=body))

    def load(self, name: str, path: Any, **more: Any) -> Answer:
        return self.post("load_lora_adapter", lora_name=name, lora_path=str(path), **more)

    def unload(self, name: str) -> Answer:
        return self.post("unload_lora_adapter", lora_name=name)

    def adapters(self) -> dict[str, dict[str, Any]]:
        """What the server lists, by name."""
        rows = self._http.get("/v1/lora_ext/adapters").raise_for_status().json()["data"]
        return {row["name"]: row for row in rows}

    def metrics(self) -> dict[str, float]:
        """Every sample, by name without labels: the sum over them."""
        found: dict[str, float] = {}
        for line in self._http.get("/metrics").raise_for_status().text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


def _answer(got: httpx.Response) -> Answer:
    version = got.headers.get(VERSION, "")
    try:
        said = got.json()
    except json.JSONDecodeError:
        return Answer(got.status_code, version=version, text=got.text)
    if got.status_code != 200:
        return _refused(got.status_code, said, got.text)
    choice = said["choices"][0]
    return Answer(
        200, tuple(choice["token_ids"]), version, sure=_sure(choice.get("logprobs") or {})
    )


def _refused(status: int, said: dict[str, Any], text: str) -> Answer:
    return Answer(status, code=str(said.get("error", {}).get("type", "")), text=text[:400])


def _sure(logprobs: dict[str, Any]) -> int:
    """Tokens before the first whose runner-up is as good but for rounding."""
    rows = logprobs.get("top_logprobs") or []
    for at, row in enumerate(rows):
        best = sorted(row.values())[-2:]
        if len(best) == 2 and best[1] - best[0] < 1e-3:
            return at
    return len(rows)
