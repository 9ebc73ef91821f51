"""ExpertLoad: what traced requests had each expert of an adapter do, summed up."""

from __future__ import annotations

from collections import OrderedDict

import torch


class ExpertLoad:
    """Sums of |weight| by adapter and expert, over traced tokens and all routed modules.

    Attributes:
        max_adapters: that are kept; the one traced longest ago goes first.
        max_experts: of an adapter. Where every rank is an expert there would be one number a rank.
    """

    max_adapters, max_experts = 64, 64

    def __init__(self) -> None:
        self._sums: OrderedDict[str, torch.Tensor] = OrderedDict()

    def add(self, adapter: str, gates_TE: torch.Tensor) -> None:
        """The gates that one module gave its experts: [n, E]."""
        more_E = gates_TE.abs().double().sum(0)
        if len(more_E) > self.max_experts:
            return
        before_E = self._sums.pop(adapter, more_E[:0])  # modules may differ in their experts
        width = max(len(before_E), len(more_E))
        sums_E = torch.zeros(width, dtype=torch.float64)
        sums_E[: len(before_E)] += before_E
        sums_E[: len(more_E)] += more_E
        self._sums[adapter] = sums_E
        while len(self._sums) > self.max_adapters:
            self._sums.popitem(last=False)

    def sums(self) -> dict[str, list[float]]:
        """By adapter, one number for each expert."""
        return {adapter: sums_E.tolist() for adapter, sums_E in self._sums.items()}
