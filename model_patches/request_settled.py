"""What a request is sent with, once it is settled: held against its prompt, put into parameters."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from vllm_lora_ext.conditions.said import FIELD
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.trace.fetch import EXTRA_ARG


@dataclass(frozen=True)
class Settled:
    """What a request is sent with.

    Args:
        lora: its adapter; version: the adapter's, with which the request is computed.
        plan: what its parameters carry about columns; trace: asked for one.
        made: whether the adapter was derived anew for it; None: it is not a derived one.
    """

    lora: LoRARequest | None
    version: str = ""
    plan: dict[str, Any] | None = None
    trace: bool = False
    made: bool | None = None


class Spoken(LoRARequest):
    """What a server hands to its engine in an adapter's place: what was settled for the request
    before its answer began."""

    target: Settled = Settled(None)


def extras_of(params: Any) -> Mapping[str, Any]:
    """What a request's parameters carry beside vLLM's own."""
    if isinstance(params, SamplingParams):
        return params.extra_args or {}
    return getattr(params, "extra_kwargs", None) or {}


def check_prompt(request: Any) -> None:
    """Holds what a request says against its prompt.

    Args:
        request: vLLM's `EngineCoreRequest`, which carries a plan.
    Raises:
        AdapterError: `bad_value`.
    """
    plan = extras_of(request.params).get(FIELD) or {}
    ids, embeds = request.prompt_token_ids, request.prompt_embeds
    length = len(embeds) if ids is None else len(ids)
    _check_spans(plan, length, {feature.modality for feature in request.mm_features or ()})


def check_input(prompt: object, target: Settled) -> None:
    """As `check_prompt`, of what a server hands to its engine.

    Args:
        prompt: vLLM's `EngineInput`; one of another kind is left to `check_prompt`.
    """
    if not isinstance(prompt, Mapping):
        return
    tokens = prompt.get("prompt_token_ids")
    tokens = prompt.get("prompt_embeds") if tokens is None else tokens
    if tokens is not None:
        _check_spans(target.plan or {}, len(tokens), prompt.get("mm_placeholders") or ())


def _check_spans(plan: Mapping[str, Any], length: int, given: Container[str]) -> None:
    for name, spans in plan.get("modality_spans", {}).items():
        last = max((stop for _, stop in spans), default=0)
        if last > length:
            raise AdapterError(
                "bad_value", f"{FIELD}.modality_spans.{name} is outside of the prompt", seen=last,
                limit=f"{length}, where the prompt ends", fix="count tokens of the whole prompt",
            )  # fmt: skip
        if name in given:
            raise AdapterError(
                "bad_value", f"{FIELD}.modality_spans.{name} stands beside inputs of that kind,"
                " whose positions are known", seen=[list(span) for span in spans],
                fix="leave it out",
            )  # fmt: skip


def carrying(params: Any, target: Settled) -> Any:
    """Parameters that carry a target's version and plan in place of what the request said; a copy
    where they differ, for the caller may use its own again.

    Raises:
        AdapterError: `bad_value`, there is no trace of requests of this kind.
    """
    before = extras_of(params)
    extras = {k: v for k, v in before.items() if k != FIELD}
    sampling = isinstance(params, SamplingParams)
    if target.plan is not None or target.version:
        extras[FIELD] = {"version": target.version, **(target.plan or {})}
    if target.trace and not sampling:
        raise AdapterError(
            "bad_value", f"{FIELD}.trace: requests of pooling models are not traced",
            fix="leave trace out",
        )  # fmt: skip
    if target.trace:
        extras[EXTRA_ARG] = True
    if extras == before or params is None:  # a prompt that carries its own
        return params
    params = copy.copy(params)
    setattr(params, "extra_args" if sampling else "extra_kwargs", extras or None)
    return params
