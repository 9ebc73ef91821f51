"""A trace from a running engine: how a request asks for one, and how it is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.settings import LoraExtSettings
from vllm_lora_ext.trace.data import Trace

EXTRA_ARG = "lora_ext_trace"
RPC = "lora_ext_trace"
OWNER = "lora_ext_owner"
"""Of a traced request's `extra_args`: who sent it, and alone gets its trace. The front end sets it;
offline there is none."""

_ON, _OFF = (True, 1, "1", "true"), (None, False, 0, "0", "false")


def wanted(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request's `SamplingParams.extra_args` (over HTTP `vllm_xargs`) ask for a trace.

    Raises:
        AdapterError: `bad_value`.
    """
    value = (extra_args or {}).get(EXTRA_ARG)
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise AdapterError(
        "bad_value", f"{EXTRA_ARG} of the request is wrong", seen=value, limit="true or false"
    )


def check_on(additional_config: Mapping[str, Any] | None) -> None:
    """Raises AdapterError `not_traced` when the engine's setting `trace` is off."""
    if not LoraExtSettings.from_additional_config(additional_config).trace:
        raise AdapterError(
            "not_traced", "this engine keeps no traces, its setting trace is off", seen=False,
            limit=True, fix='start it with --additional-config \'{"lora_ext": {"trace": true}}\'',
        )  # fmt: skip


def fetch(llm: Any, request_id: str, choice: int = 0) -> Trace:
    """The trace of a request of an offline engine.

    Args:
        llm: vLLM's `LLM`, started with the setting `trace`.
        request_id: `RequestOutput.request_id`; the request had
            `SamplingParams(extra_args={"lora_ext_trace": True})`.
        choice: which of its `n` outputs.
    Raises:
        AdapterError: `not_traced` (the setting is off, or the request did not ask),
            `not_found`, `too_large`.
    """
    check_on(llm.llm_engine.vllm_config.additional_config)
    return read_answers(llm.collective_rpc(RPC, args=(request_id, 0, choice)))


def read_answers(answers: Sequence[str]) -> Trace:
    """One trace from what the engine's workers answered: a trace's JSON, or an error's text.

    Raises:
        AdapterError: as `TraceStore.get`.
    """
    for text in answers:
        error = None if text.startswith("{") else AdapterError.parse(text)
        if error is not None:
            raise error
    return Trace.merged([Trace.from_json(text) for text in dict.fromkeys(answers)])
