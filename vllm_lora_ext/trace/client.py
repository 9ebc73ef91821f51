"""A trace from a running server, over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.trace.data import Trace
from vllm_lora_ext.trace.fetch import EXTRA_ARG

PATH = "/v1/lora_ext/trace/"
TIMEOUT_S = 600.0


def ask_server(
    url: str,
    model: str,
    prompt: str | list[int],
    new_tokens: int = 1,
    chat: bool = False,
    api_key: str | None = None,
) -> Trace:
    """Sends one greedy request that asks for its trace, and fetches it.

    Args:
        url: of the server, `http://host:8000`.
        model: the adapter's name there.
        prompt: text, or token ids (not with `chat`).
        chat: send the text as a user's message, through the model's chat template.
    Raises:
        AdapterError: `request_failed`, no answer or an error; `not_traced`.
    """
    url = url.rstrip("/").removesuffix("/v1")
    body: dict[str, Any] = {
        "model": model, "max_tokens": new_tokens, "temperature": 0, "vllm_xargs": {EXTRA_ARG: 1},
    }  # fmt: skip
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    path = "/v1/chat/completions" if chat else "/v1/completions"
    answer = json.loads(_call(url + path, api_key, body))
    request_id = answer.get("id") if isinstance(answer, dict) else None
    if not isinstance(request_id, str):
        raise _failed(url, f"an answer without an id: {str(answer)[:200]}")
    quoted = urllib.parse.quote(request_id, safe="")
    return Trace.from_json(_call(url + PATH + quoted, api_key))


def _call(url: str, api_key: str | None, body: dict[str, Any] | None = None) -> str:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _failed(url, "not an http:// or https:// address")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # POST when there is data
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
            json.loads(text)
            return str(text)
    except urllib.error.HTTPError as error:
        raise _typed(url, error.code, error.read().decode(errors="replace")) from error
    except (OSError, ValueError) as error:
        raise _failed(url, getattr(error, "reason", error)) from error


def _typed(url: str, status: int, text: str) -> AdapterError:
    """The server's own error where it is one of ours."""
    known = AdapterError.parse(text)
    if known is not None:
        return known
    try:
        error = json.loads(text)["error"]
        code, message = error["type"], error["message"]
    except (ValueError, KeyError, TypeError):
        return _failed(url, f"{status} {text[:200]}")
    if code in ("not_traced", "not_found", "too_large"):
        known = AdapterError.parse(f"[lora_ext:{code}] {message} [/lora_ext]")
    return known or _failed(url, f"{status} {str(message)[:300]}")


def _failed(url: str, why: object) -> AdapterError:
    return AdapterError(
        "request_failed", f"the server gives no trace: {why}", seen=url,
        fix="check its address, the model's name, and that it runs this plugin",
    )  # fmt: skip
