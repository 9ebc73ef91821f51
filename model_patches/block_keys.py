"""What of a request's adapters stands in the keys of its blocks in the prefix cache.

Tokens' keys and values are the same where every adapter adds the same: so a block's key has, of
each adapter that adds something to one of its positions, the version, and how much it adds where.
Positions that only the base model computes share the base's blocks; an adapter that stands alone
and whole, those of its plain requests. Where gates are frozen at the end of a prompt, blocks behind
it are known by where that is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from vllm_lora_ext.model_patches.plan import Plan, Values, prompt_length, prompt_of
from vllm_lora_ext.model_patches.residency import KeyedPart

Entry = tuple[str, str]


class BlockKeys:
    """Of one request; equal ones give equal keys.

    Args:
        parts: of the request's slot.
        plan: its columns, those of all parts in their order.
        request: vLLM's `Request`.
        most: positions that it may have.
    """

    def __init__(self, parts: tuple[KeyedPart, ...], plan: Plan, request: Any, most: int) -> None:
        self._parts, self._plan = parts, plan
        self._request, self._most = request, most

    @cached_property
    def _values(self) -> Values:
        """Not before a block asks: a key that equals the one that a request has is dropped."""
        return Values(self._plan.columns, prompt_of(self._request, self._plan), self._most)

    def __eq__(self, other: object) -> bool:
        mine = self._parts, self._plan
        return isinstance(other, BlockKeys) and mine == (other._parts, other._plan)

    def __hash__(self) -> int:
        return hash(self._parts)

    def entries(self, start: int, stop: int) -> list[Entry]:
        """Of the block of these positions; none where only the base model computes it."""
        values_TC, at, found = self._values.at(start, stop), 0, []
        for part in self._parts:
            entry = _entry(part, values_TC[:, at : at + part.width])
            at += part.width
            if entry is not None:
                found.append(("lora", entry + self._frozen_at(part, stop)))
        return sorted(found)

    def _frozen_at(self, part: KeyedPart, stop: int) -> str:
        """The gates themselves follow from the tokens before, which are in the key already."""
        end = prompt_length(self._request)
        return f":frozen at {end}" if part.frozen and stop > end else ""


def salted(parts: tuple[KeyedPart, ...], salt: str) -> tuple[KeyedPart, ...]:
    """Parts whose keys are no other's."""
    return tuple(replace(part, version=f"{part.version}:{salt}") for part in parts)


def is_plain(parts: tuple[KeyedPart, ...]) -> bool:
    """Whether it is one adapter, whole, and in all positions the same."""
    return len(parts) == 1 and not parts[0].width and parts[0].scale == 1.0 and not parts[0].frozen


def _entry(part: KeyedPart, values_TC: np.ndarray) -> str | None:
    """How much of one adapter is added in one block: its version alone where it is all of it."""
    factor_T1 = np.full((len(values_TC), 1), part.scale, dtype=np.float32)
    own_TC = values_TC
    if part.by_row:
        factor_T1, own_TC = values_TC[:, :1], values_TC[:, 1:]
    if not own_TC.shape[1]:
        adds_TC = factor_T1
    elif part.linear:
        adds_TC = factor_T1 * own_TC
    else:
        adds_TC = np.concatenate([factor_T1, np.where(factor_T1 != 0, own_TC, 0)], axis=1)
    if not adds_TC.any():
        return None
    if (adds_TC == 1).all():
        return part.version
    pattern = np.ascontiguousarray(adds_TC + 0.0, dtype="<f4")  # no zero is negative
    return f"{part.version}:{sha256(pattern.tobytes()).hexdigest()[:32]}"
