"""Random contents of a slot: one adapter or several, with factors and numbers of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tests.make_adapters import GIVEN, SOURCES, pick, random_module, random_spec
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.reference import SlotPart
from vllm_lora_ext.routing import GateSpec

ALL_SOURCES = (*SOURCES, *GIVEN)


def random_parts(
    rng: np.random.Generator, k: int, sizes: Sequence[int], max_rank: int, plain: float = 0.3
) -> list[SlotPart]:
    """One to four adapters whose ranks fit into one slot.

    Args:
        plain: chance that a slice's part has no gate.
    """
    count = int(rng.integers(1, 5))
    parts, column = [], 0
    for _ in range(count):
        slices = []
        for n in sizes:
            spec = GateSpec()
            if rng.random() > plain:
                spec = random_spec(rng, max_rank // count, ALL_SOURCES, wide=True)
            rank = int(rng.integers(1, max_rank // count + 1))
            empty = rng.random() < 0.15
            slices.append(None if empty else random_module(rng, k, n, spec, rank))
        factor_at = -1
        if rng.random() < 0.5:
            factor_at, column = column, column + 1
        scale = pick(rng, [1.0, 1.0, -0.5, 2.0, 0.0])
        parts.append(SlotPart(slices, scale, factor_at, column))
        column += max((s.gate.columns for s in slices if s), default=0)
    return parts


def random_rows(rng: np.random.Generator, t: int, columns: int) -> np.ndarray:
    """Numbers of every row; many are 0 or 1, as those of spans are."""
    values_TC = rng.standard_normal((t, columns)).astype(np.float32)
    kind_TC = rng.integers(0, 3, (t, columns))
    return np.where(kind_TC == 0, 0, np.where(kind_TC == 1, 1, values_TC)).astype(np.float32)


def each(content: Sequence, f: Callable) -> list:
    """A slot's content, one adapter or its parts, with f of each module in its place."""
    if content and isinstance(content[0], SlotPart):
        return [replace(part, slices=each(part.slices, f)) for part in content]
    return [m and f(m) for m in content]


def put(site: Site, slot: int, parts: Sequence[SlotPart]) -> None:
    """Composes the parts into the slot."""
    packed = [(site.pack(p.slices), p.scale, p.factor_at, p.row_start) for p in parts]
    site.load(slot, site.compose(packed))
