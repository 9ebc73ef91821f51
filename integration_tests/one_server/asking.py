"""How the one server of these tests is asked: by its OpenAI client, and by its own routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import NotFoundError, OpenAI

from integration_tests.engines import recorded
from integration_tests.server import Server

BOUND = 2e-3
LOADING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
TOKEN = "the-operators-token-of-this-test"
ADMIN = {"x-lora-ext-token": TOKEN}
PLAIN, MOE = recorded("plain-a"), recorded("loramoe-a")


def ask(client: OpenAI, model: str, prompt: Any, n: int = 12, **extra: Any) -> Any:
    """The one choice of a greedy completion."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=n, temperature=0, logprobs=5,
        extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
    )  # fmt: skip
    return answer.choices[0]


def load(server: Server, name: str, path: Path | str, **more: Any) -> httpx.Response:
    return post(server, "load_lora_adapter", lora_name=name, lora_path=str(path), **more)


def unload(server: Server, name: str, **more: Any) -> httpx.Response:
    return post(server, "unload_lora_adapter", lora_name=name, **more)


def post(
    server: Server, route: str, headers: dict[str, str] = ADMIN, **body: Any
) -> httpx.Response:
    url = f"{server.url}/v1/{route}"
    return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)


def send(server: Server, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/{route}", json=body, timeout=60, trust_env=False)


def listed(server: Server, name: str) -> dict[str, Any]:
    """What the server says of an adapter."""
    answer = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    (row,) = [row for row in answer.json()["data"] if row["name"] == name]
    return row


def version_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-lora-ext-version"]


def names(client: OpenAI) -> set[str]:
    return {card.id for card in client.models.list()}


def refused(client: OpenAI, name: str) -> None:
    """A name that is not loaded answers 404, never as the base model."""
    with pytest.raises(NotFoundError):
        ask(client, name, PLAIN.prompts[0], 1)


def worst_prompt(choice: Any, wanted: torch.Tensor) -> float:
    """Largest difference of the log-probabilities that came back for the prompt."""
    logp = torch.log_softmax(wanted.double(), -1)
    rows = choice.prompt_logprobs[1:]
    assert len(rows) == wanted.shape[0] - 1
    return max(
        abs(entry["logprob"] - logp[t, int(token)].item())
        for t, row in enumerate(rows) for token, entry in row.items()
    )  # fmt: skip


def fingerprint(client: OpenAI) -> dict[str, Any]:
    """Tokens and exact log-probabilities of a good adapter, a routed one and the base."""
    choices = {m: ask(client, m, PLAIN.prompts[1], 4) for m in ("plain", "loramoe", "base")}
    return {m: (c.token_ids, c.logprobs.top_logprobs) for m, c in choices.items()}


def counters(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("lora_ext:"))
    return {name: float(value) for name, value in lines}


def of_its_own(client: OpenAI) -> OpenAI:
    """A client with its own connections: one thread may close what another reads from."""
    return OpenAI(
        base_url=client.base_url, api_key=client.api_key, max_retries=0, timeout=client.timeout,
        http_client=httpx.Client(trust_env=False),
    )  # fmt: skip
