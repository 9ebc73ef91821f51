"""Every output says which version of its adapter gave it.

Targets: `RequestState`, which makes a request's outputs: each gets `adapter_version`, the digest of
the adapter's content (of a derived adapter, of all that it is made of), None for the base model.
And what `LLM` makes new outputs of them with: embeddings, classes and scores (`from_base`), a score
of two embeddings (`_post_process`), beams. What two versions gave together says None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.pooling.scoring.io_processor import (
    BiEncoderIOProcessor,
    LateInteractionIOProcessor,
)
from vllm.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    ScoringRequestOutput,
)
from vllm.v1.engine.output_processor import RequestState

from vllm_lora_ext.model_patches.plan import promised

_VERSION = "_lora_ext_version"


def apply() -> None:
    """Wraps what takes a request, what makes its outputs, and what makes others of them."""
    for made in (ClassificationRequestOutput, EmbeddingRequestOutput, ScoringRequestOutput):
        made.from_base = staticmethod(_as_before(made.from_base))
    for scores in (BiEncoderIOProcessor, LateInteractionIOProcessor):
        scores._post_process = _of_both(scores._post_process)
    BeamSearchOfflineMixin.beam_search = _of_beams(BeamSearchOfflineMixin.beam_search)
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
        return output

    RequestState.from_new_request = classmethod(new_from_new)
    RequestState._new_request_output = new_new_output


def _as_before(from_base: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(from_base)
    def new_from_base(request_output: Any) -> Any:
        output = from_base(request_output)
        output.adapter_version = getattr(request_output, "adapter_version", None)
        return output

    return new_from_base


def _of_both(post_process: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(post_process)
    def new_post_process(self: Any, outputs: Sequence[Any], n_queries: int) -> Any:
        scores = post_process(self, outputs, n_queries)
        given = [getattr(output, "adapter_version", None) for output in outputs]
        asked, answers = given[:n_queries], given[n_queries:]
        asked = asked * len(answers) if n_queries == 1 else asked
        for score, one, other in zip(scores, asked, answers, strict=True):
            score.adapter_version = one if one == other else None
        return scores

    return new_post_process


def _of_beams(beam_search: Callable[..., Any]) -> Callable[..., Any]:
    """Every token of a beam is a request of its own, which begins on the version of that time."""

    @functools.wraps(beam_search)
    def new_beam_search(
        self: Any, prompts: Any, params: Any, lora_request: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        several = isinstance(lora_request, Sequence)
        named = lora_request if several else [lora_request]
        before = [_version(self, request) for request in named]
        outputs = beam_search(self, prompts, params, lora_request, *args, **kwargs)
        after = [_version(self, request) for request in named]
        whole = [v if first in ("", v) else None for first, v in zip(before, after, strict=True)]
        for output, version in zip(
            outputs, whole if several else whole * len(outputs), strict=True
        ):
            output.adapter_version = version
        return outputs

    return new_beam_search


def _version(llm: Any, request: Any) -> str | None:
    """Of an adapter's content; empty before it was loaded."""
    version: str | None = None if request is None else llm.llm_engine.adapter_version(request)
    return version
