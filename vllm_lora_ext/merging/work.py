"""One module's share of a merge, as the methods see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_lora_ext.merging.factors import Pair


@dataclass(frozen=True)
class ModuleTerm:
    """What one adapter has on one module.

    Args:
        index: the adapter's place among the terms.
        name: the adapter's name; random draws and stored masks go by it.
        pair: its factors, scale folded into B, weight not.
        weight: the number that its weight means on this module.
        scale: the scale that was folded in.
        settings: the merge's settings with this adapter's own density, epsilon and gamma.
    """

    index: int
    name: str
    pair: Pair
    weight: float
    scale: float
    settings: Mapping[str, Any]

    @property
    def raw(self) -> Pair:
        """A and B as the tool that saved them had them, the scale taken out of B again.

        Where a value of half precision gives this B, it is that value: rounding must not break
        ties between entries that were equal in the file.
        """
        a_RK, b_NR = self.pair
        if self.scale in (0.0, 1.0):
            return self.pair
        raw_NR = b_NR / self.scale
        for dtype in (torch.float16, torch.bfloat16):
            half_NR = raw_NR.to(dtype).float()
            raw_NR = torch.where(half_NR * self.scale == b_NR, half_NR, raw_NR)
        return Pair(a_RK, raw_NR)


@dataclass(frozen=True)
class Work:
    """One module of a merge.

    Args:
        module: its name.
        parts: the adapters with a rank above 0 on it, in the order of the terms.
        settings: the merge's parameters, all of them, defaults filled in.
        first_scale: the first term's, also where it lacks the module; some tools take it for all.
        masks: stored masks by `<module>.<part>.<adapter>`, or None to draw them.
        shared: what the method's survey found out over all modules.
    """

    module: str
    parts: list[ModuleTerm]
    settings: Mapping[str, Any]
    first_scale: float = 1.0
    masks: Mapping[str, torch.Tensor] | None = None
    shared: Any = None


@dataclass(frozen=True)
class Result:
    """A merged module: a pair, or a dense delta [out, in]; and what the report says of it."""

    delta: Pair | torch.Tensor
    notes: dict[str, Any] = field(default_factory=dict)


Works = Callable[[], Iterator[Work]]  # all modules anew, for a survey
