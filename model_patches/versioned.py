"""Every output says which version of its adapter gave it.

Targets: `RequestState`, which makes a request's outputs: each gets `adapter_version`, the digest of
the adapter's content (of a derived adapter, of all that it is made of), None for the base model.
Outputs that are made of these (embeddings, labels, scores of two texts, beams) get theirs:
`from_base` of three classes, `score` and `beam_search` of `LLM`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.pooling.offline import PoolingOfflineMixin
from vllm.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    ScoringRequestOutput,
)
from vllm.v1.engine.output_processor import RequestState

from vllm_lora_ext.model_patches.plan import promised

_VERSION = "_lora_ext_version"
_Heard = dict[str | None, set[str | None]]
_heard: ContextVar[_Heard | None] = ContextVar("heard", default=None)
"""Versions by the adapter's name, of the requests that one call of a user's is made of."""


def _version_of(heard: _Heard, lora: Any) -> str | None:
    """None too where an adapter was replaced midway: no version alone gave the output."""
    versions = set().union(*heard.values())
    if len(versions) > 1:  # else whatever a derived adapter is called
        versions = heard.get(getattr(lora, "lora_name", None), set())
    return next(iter(versions)) if len(versions) == 1 else None


def _from_base(stock: Callable[[Any], Any]) -> staticmethod[[Any], Any]:
    @functools.wraps(stock)
    def from_base(request_output: Any) -> Any:
        output = stock(request_output)
        output.adapter_version = getattr(request_output, "adapter_version", None)
        return output

    return staticmethod(from_base)


def _of_several(stock: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A method of `LLM` each of whose outputs is made of those of several requests."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        heard: _Heard = {}
        token = _heard.set(heard)
        try:
            outputs = stock(self, *args, **kwargs)
        finally:
            _heard.reset(token)
        lora = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        loras = lora if isinstance(lora, list) else [lora] * len(outputs)
        of_outputs = loras[len(loras) - len(outputs) :]  # of two texts, the second one's
        for output, each in zip(outputs, of_outputs, strict=True):
            output.adapter_version = _version_of(heard, each)
        return outputs

    return method


def apply() -> None:
    """Wraps what takes a request and what makes its outputs."""
    from_new, new_output = RequestState.from_new_request, RequestState._new_request_output

    @functools.wraps(from_new)
    def new_from_new(cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = from_new.__func__(cls, tokenizer, request, *args, **kwargs)
        setattr(state, _VERSION, promised(request))
        return state

    @functools.wraps(new_output)
    def new_new_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_output(self, *args, **kwargs)
        output.adapter_version = getattr(self, _VERSION, None)
        if (heard := _heard.get()) is not None:
            heard.setdefault(self.lora_name, set()).add(output.adapter_version)
        return output

    RequestState.from_new_request = classmethod(new_from_new)
    RequestState._new_request_output = new_new_output
    for made in (EmbeddingRequestOutput, ClassificationRequestOutput, ScoringRequestOutput):
        made.from_base = _from_base(made.from_base)
    PoolingOfflineMixin.score = _of_several(PoolingOfflineMixin.score)
    BeamSearchOfflineMixin.beam_search = _of_several(BeamSearchOfflineMixin.beam_search)
