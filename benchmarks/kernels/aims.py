"""What the kernels are meant to reach on an H100, and whether rows of the benchmark do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Aim:
    """At most `limit` in a column, over all rows of a case with some numbers of tokens."""

    text: str
    column: str
    case: str
    tokens: tuple[int, ...]
    limit: float

    def worst(self, rows: Sequence[dict[str, Any]]) -> float | None:
        """None where it was not measured."""
        mine = [r for r in rows if r["case"] == self.case and r["tokens"] in self.tokens]
        values = [r[self.column] for r in mine if r[self.column] is not None]
        return max(values, default=None)


DECODE = (1, 8, 32, 64)
AIMS = (
    Aim("routed 8/2/16 at T ≤ 64, over stock's kernels at rank 32", "of_stock_kr", "8/2/16", DECODE,
        1.15),
    Aim("plain LoRA of rank 16 at T ≤ 64, over stock's kernels", "of_stock_kr", "1/1/16", DECODE,
        1.0),
    Aim("a routed Llama-3.1-8B decode layer adds", "added", "8/2/16", DECODE, 0.15),
    Aim("the same, the shrink beside the product (aim: 0.08)", "added_beside", "8/2/16", DECODE,
        0.15),
    Aim("the same, A and routers below the base weight", "added_extended", "8/2/16", DECODE, 0.075),
    # At least 0.90 of the base's speed.
    Aim("a routed prefill of T = 8192 adds", "added", "8/2/16", (8192,), 0.11),
)  # fmt: skip
