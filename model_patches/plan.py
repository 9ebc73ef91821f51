"""What a request says of the columns of its adapter, as the engine's processes read it.

A plan travels in the request's own parameters, which reach every worker and outlive a preemption:
`SamplingParams.extra_args`, or of a pooling request `PoolingParams.extra_kwargs`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_lora_ext.conditions.column import Column, Prompt, values
from vllm_lora_ext.conditions.said import FIELD
from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class Plan:
    """Columns in the order of the slot, and which positions of ids stand for other inputs."""

    columns: tuple[Column, ...]
    modality_spans: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)


class Values:
    """The columns' values at every position of one request, in runs of equal ones.

    Args:
        most: positions that the request may have.
    """

    def __init__(self, columns: Sequence[Column], prompt: Prompt, most: int) -> None:
        # Behind the last bound of anything that is said, nothing changes any more.
        bounds = [prompt.length]
        bounds += [b for c in columns for span in c.spans or () for b in span if b is not None]
        bounds += [b for spans in prompt.modality.values() for span in spans for b in span]
        every_TC = values(columns, prompt, 0, min(max(bounds), most) + 1)
        changes = np.flatnonzero((every_TC[1:] != every_TC[:-1]).any(axis=1)) + 1
        self._starts = np.concatenate([[0], changes])
        self._runs_PC = every_TC[self._starts]

    def at(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, C]: of the positions from `start`."""
        runs = np.searchsorted(self._starts, np.arange(start, stop), side="right") - 1
        return self._runs_PC[runs]


def plan_of(request: Any) -> Plan | None:
    """Of vLLM's `Request` or `NewRequestData`; None for one that says nothing of columns.

    Raises:
        AdapterError: `bad_value`.
    """
    said = (_params(request) or {}).get(FIELD)
    if not isinstance(said, Mapping) or "columns" not in said:
        return None
    try:
        columns = tuple(Column.from_dict(column) for column in said["columns"])
        spans = {
            str(name): tuple((int(start), int(stop)) for start, stop in spans)
            for name, spans in (said.get("modality_spans") or {}).items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            "bad_value", "the request's plan is not what the front end writes", seen=str(error),
            fix="send the request through the plugin's front end",
        ) from error  # fmt: skip
    return Plan(columns, spans)


def promised(request: Any) -> str | None:
    """The version of its adapter that the front end has told a request's sender; None: none."""
    said = (_params(request) or {}).get(FIELD)
    version = said.get("version") if isinstance(said, Mapping) else None
    return version if isinstance(version, str) else None


def attach(request: Any, columns: Sequence[Column]) -> None:
    """Has a request carry columns, beside what else it says; its parameters may be others'."""
    said = (_params(request) or {}).get(FIELD)
    said = {
        **(said if isinstance(said, Mapping) else {}),
        "columns": [c.to_dict() for c in columns],
    }
    for name, args in _PLACES:
        params = getattr(request, name)
        if params is not None:
            params = copy.copy(params)
            setattr(params, args, {**(getattr(params, args) or {}), FIELD: said})
            setattr(request, name, params)


def prompt_length(request: Any) -> int:
    """Of vLLM's `Request` or `NewRequestData`, whatever of its answer has been computed."""
    ids = request.prompt_token_ids
    return len(request.prompt_embeds if ids is None else ids)


def prompt_of(request: Any, plan: Plan) -> Prompt:
    """What the columns' values depend on."""
    ids = request.prompt_token_ids
    if ids is not None and request.prompt_is_token_ids is not None:  # the others are placeholders
        ids = [i if own else -1 for i, own in zip(ids, request.prompt_is_token_ids, strict=True)]
    modality: dict[str, list[tuple[int, int]]] = {}
    for name, spans in plan.modality_spans.items():
        modality.setdefault(name, []).extend(spans)
    for feature in request.mm_features or ():
        ranges = feature.mm_position.extract_embeds_range()
        modality.setdefault(feature.modality, []).extend((a, b + 1) for a, b in ranges)
    every = {name: tuple(spans) for name, spans in modality.items()}
    return Prompt(prompt_length(request), ids, every)


_PLACES = (("sampling_params", "extra_args"), ("pooling_params", "extra_kwargs"))


def _params(request: Any) -> Mapping[str, Any] | None:
    for name, args in _PLACES:
        params = getattr(request, name)
        if params is not None:
            found: Mapping[str, Any] | None = getattr(params, args)
            return found
    return None
