"""Gates that are computed from an instruction by the base model itself: the worker's part.

The engine core sends the instruction's ids as a request of its own, without an adapter. This takes
the hidden states of its rows as they go into the model's final norm, chunk after chunk, and pools
them. Only steps with such rows pay: they run eagerly, so that the norm's input can be seen.

Targets, wrapped when a worker gets its first adapter of that kind: V1's
`GPUModelRunner._determine_batch_execution_and_padding`, V2's `GPUModelRunner.execute_model` and
`dispatch_cg_and_sync_dp`.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.core.sched.output import NewRequestData

from vllm_lora_ext.adapters.template import Pooling, Template
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.rows import RUNNERS, Rows, Span, wrap_once

MARK = "lora_ext_gate"
"""In `extra_args` of the core's request: the id of the adapter whose gate it is for."""

_eager_v2 = False


@dataclass
class _Pass:
    """One instruction on its way: how many of its tokens are pooled."""

    pooling: Pooling
    length: int
    seen: int = 0


class InstructionPass:
    """Of one worker.

    Args:
        rows: of the engine.
        model: the served model, its layers wrapped.
        template_of: the template under an adapter's id; None: it is gone.
    Raises:
        AdapterError: `unsupported_feature`, the model's final norm is not known.
    """

    def __init__(
        self, rows: Rows, model: torch.nn.Module, template_of: Callable[[int], Template | None]
    ) -> None:
        norm = _final_norm(model)
        self._template_of, self._rows = template_of, rows
        self._passes: dict[str, _Pass] = {}
        self._spans: Sequence[Span] = ()
        self._watch = rows.watch(_wants, self._take)
        self.computes = not isinstance(norm, PPMissingLayer)
        model.register_forward_pre_hook(self._skip_compiled)
        if self.computes:
            norm.register_forward_pre_hook(self._see)
        rows.instruction = self
        _wrap_runners()

    @property
    def scheduled(self) -> bool:
        """Whether the step that has begun computes rows of an instruction."""
        return self._watch.scheduled

    def finish(self, request_id: str) -> str | None:
        """The gate of a request that the engine is done with: fp32 little-endian in base64.

        Returns:
            None on a pipeline rank that does not compute it.
        Raises:
            AdapterError: `load_failed`, not all of its states were seen; `bad_value`.
        """
        if not self.computes:
            return None
        done = self._passes.pop(request_id, None)
        if done is None or done.seen != done.length:
            raise AdapterError(
                "load_failed", "the base model's states over the instruction were not all computed",
                seen="none" if done is None else f"{done.seen} of {done.length} tokens",
                fix="send the request again",
            )  # fmt: skip
        return base64.b64encode(done.pooling.gate().numpy().astype("<f4").tobytes()).decode()

    def _take(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        for span in spans:
            key = span.request.req_id
            template = self._template_of(span.request.sampling_params.extra_args[MARK])
            if span.at == 0 and template is not None:  # also again, after a preemption
                length = len(span.request.prompt_token_ids)
                self._passes[key] = _Pass(template.pooling(), length)

    def _skip_compiled(self, model: torch.nn.Module, args: Any) -> None:
        if self._spans and is_forward_context_available():
            get_forward_context().skip_compiled = True

    def _see(self, norm: torch.nn.Module, args: tuple[Any, ...]) -> None:
        for span in () if self._rows.in_first_pass else self._spans:
            found = self._passes.get(span.request.req_id)
            count = found.length - span.at if found is not None else 0
            if found is None or found.seen != span.at or count <= 0:
                continue
            stop = min(span.stop, span.start + count)
            hidden_TK = args[0][span.start : stop].float()
            if len(args) > 1 and args[1] is not None:  # what the last layer left to be added
                hidden_TK = hidden_TK + args[1][span.start : stop].float()
            found.pooling.add(hidden_TK)
            found.seen += stop - span.start


def _wants(request: NewRequestData) -> bool:
    params = request.sampling_params
    return params is not None and MARK in (params.extra_args or {})


def _final_norm(model: Any) -> torch.nn.Module:
    language = model.get_language_model() if hasattr(model, "get_language_model") else model
    norm = getattr(getattr(language, "model", None), "norm", None)
    if not isinstance(norm, torch.nn.Module):
        raise AdapterError(
            "unsupported_feature", "the adapter's gate is computed from what goes into the model's"
            " final norm, and this model's is not known", seen=type(model).__name__,
            limit="models that are built like Llama", fix="serve it with the model it was made for",
        )  # fmt: skip
    return norm


def _wrap_runners() -> None:
    v1, v2 = (sys.modules.get(name) for name in RUNNERS)
    if v1 is not None:
        wrap_once(v1.GPUModelRunner, _determine_batch_execution_and_padding=_eager_v1)
    if v2 is not None:
        wrap_once(v2.GPUModelRunner, execute_model=_flagging)
        wrap_once(v2, dispatch_cg_and_sync_dp=_dispatching)


def _is_scheduled(runner: Any) -> bool:
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    found = getattr(getattr(manager, "rows", None), "instruction", None)
    return found is not None and found.scheduled


def _eager_v1(stock: Any) -> Any:
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_scheduled(self):
            kwargs["force_eager"] = True
        return stock(self, *args, **kwargs)

    return _determine_batch_execution_and_padding


def _flagging(stock: Any) -> Any:
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _eager(_is_scheduled(self)):
            return stock(self, *args, **kwargs)

    return execute_model


@contextmanager
def _eager(on: bool) -> Any:
    global _eager_v2
    before, _eager_v2 = _eager_v2, on
    try:
        yield
    finally:
        _eager_v2 = before


def _dispatching(stock: Any) -> Any:
    def dispatch_cg_and_sync_dp(*args: Any, **kwargs: Any) -> Any:
        if _eager_v2:
            kwargs["need_eager"] = True
        return stock(*args, **kwargs)

    return dispatch_cg_and_sync_dp


def apply() -> None:
    """Nothing at start: a worker wraps when it gets its first adapter of that kind."""
