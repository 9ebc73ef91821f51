"""X-LoRA with gates that are frozen where a request's prompt ends: an approximation in one pass.

The prompt is computed as ever, in two passes. The gates of its last token are kept, and every token
behind it takes them, without a first pass: what such a pass would read of those tokens is in no
cache from then on. So nobody but the request, or one with the same prompt, may use their blocks
(`block_keys`). After a preemption the end of the prompt may come from the prefix cache, so the
gates are kept until the request is done.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches.plan import prompt_length
from vllm_lora_ext.model_patches.rows import Rows, Span


class FrozenGates:
    """Of one engine.

    Args:
        rows: of the engine; step: of its language model.
    """

    def __init__(self, rows: Rows, step: StepMap) -> None:
        self._step = step
        self._watch = rows.watch(lambda request: request.lora_request is not None, self._take)
        self._spans: Sequence[Span] = ()
        self._kept: dict[str, torch.Tensor] = {}

    def _take(self, spans: Sequence[Span]) -> None:
        self._spans = spans

    def known(self, slots: Collection[int]) -> bool:
        """Whether every row of the step in these slots takes gates that are kept."""
        spans = [span for span in self._spans if span.slot in slots]
        return bool(spans) and all(
            span.at >= prompt_length(span.request) and span.request.req_id in self._kept
            for span in spans
        )

    def keep(self, slot: int, gates: int) -> None:
        """Takes the gates of the last tokens of the prompts of a slot's rows, when they stand in
        the step's table.

        Args:
            gates: how many a row has.
        """
        for span in self._spans:
            last = span.start + prompt_length(span.request) - 1 - span.at
            if span.slot == slot and span.start <= last < span.stop:
                kept = {key: g for key, g in self._kept.items() if self._watch.knows(key)}
                self._kept = kept | {span.request.req_id: self._step.rows_TC[last, :gates].clone()}

    def fill(self, slots: Collection[int]) -> None:
        """Writes what is kept into the step's table, for all rows of these slots behind their
        prompts."""
        rows, gates = [], []
        for span in self._spans:
            kept = self._kept.get(span.request.req_id)
            first = span.start + max(0, prompt_length(span.request) - span.at)
            if span.slot in slots and kept is not None and first < span.stop:
                rows.append(self._step.rows_TC[first : span.stop, : len(kept)])
                gates.append(kept.expand_as(rows[-1]))
        if rows:
            torch._foreach_copy_(rows, gates)
