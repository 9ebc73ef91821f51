"""The numbers that come with each row of a step, for the requests whose adapter needs some.

Made when a worker gets its first adapter with columns: until then a step knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import NewRequestData

from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches.plan import Values, plan_of, prompt_of
from vllm_lora_ext.model_patches.rows import Rows, Span


class RowColumns:
    """Fills an engine's table of rows, once a step.

    Args:
        rows: of the engine; step: of its language model.
        most: positions that a request may have.
    """

    def __init__(self, rows: Rows, step: StepMap, most: int) -> None:
        self._step, self._most = step, most
        rows.watch(self._wants, self._take)

    def _wants(self, request: NewRequestData) -> bool:
        plan = plan_of(request)
        if plan is None or not plan.columns:
            return False
        # Kept where the request is: V2 sends it again when it goes on after a preemption.
        kept: Any = request
        kept._lora_ext_values = Values(plan.columns, prompt_of(request, plan), self._most)
        return True

    def _take(self, spans: Sequence[Span]) -> None:
        if not spans:
            return
        found = [_values(s).at(s.at, s.at + s.stop - s.start) for s in spans]
        width = max(values_TC.shape[1] for values_TC in found)
        values_TC = np.zeros((sum(map(len, found)), width), dtype=np.float32)
        at = 0
        for own_TC in found:
            values_TC[at : at + len(own_TC), : own_TC.shape[1]] = own_TC
            at += len(own_TC)
        self._step.set_rows(values_TC, [slice(s.start, s.stop) for s in spans])


def _values(span: Span) -> Values:
    kept: Any = span.request
    values: Values = kept._lora_ext_values
    return values
