"""Entry-wise merges: thin out, elect signs, add up, in a space of choice (TIES, DARE, DELLA, ...).

One function and a table of rules stand for the flavours that tools have under the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.elect import (
    ALL,
    Divide,
    Draw,
    Election,
    Sign,
    merge_entries,
    row_blocks,
    sign_votes,
)
from vllm_lora_ext.merging.ops.factor_linear import Mode, side_weights
from vllm_lora_ext.merging.ops.seeds import generator
from vllm_lora_ext.merging.ops.spaces import SPACES, Name, Space
from vllm_lora_ext.merging.ops.sparsify import (
    Kind,
    Mask,
    Rescale,
    Sparsity,
    kept_count,
    kth_magnitudes,
    sparsify,
)
from vllm_lora_ext.merging.work import Part, Result, Work, Works


@dataclass(frozen=True)
class Rule:
    """One flavour of an entry-wise merge.

    Args:
        space: where entries are compared.
        kind, rescale, extra, up: see `Sparsity`.
        sign, divide, majority: see `Election`.
        scope: the share of magnitude pruning is taken per tensor, or over the whole adapter.
        sides: factor space only, how a weight is put on A and B; `raw` also takes the first
            adapter's scale for all.
        iso: the singular values of the result become their mean.
    """

    kind: Kind
    space: Name = "core"
    rescale: Rescale = "none"
    sign: Sign = "none"
    divide: Divide = "none"
    extra: bool = False
    up: bool = False
    majority: bool = False
    scope: Literal["tensor", "adapter"] = "tensor"
    sides: Mode = "peft"
    iso: bool = False

    @property
    def election(self) -> Election:
        return Election(self.sign, self.divide, self.majority)

    def sparsity(self, part: Part) -> Sparsity:
        s = part.settings
        return Sparsity(
            self.kind, s["density"], s["epsilon"], s["gamma"], self.rescale, self.extra, self.up
        )


class Survey(NamedTuple):
    """What is counted over all modules: thresholds per adapter, and the sign of most entries."""

    thresholds: list[float]
    majority: float | None


def merge_nonlinear(work: Work, rule: Rule) -> Result:
    """One module by a rule; random kinds draw by (seed, module, adapter, part).

    Raises:
        AdapterError: `rank_mismatch` (factor space), `missing_tensor` and `shape_mismatch` of
            stored masks.
    """
    space = _space(work, rule)
    merged = {}
    for name, draws in space.parts.items():
        thin = _thinned(work, rule, name, draws)
        weights = [_weight(part, rule, name) for part in work.parts]
        majority = work.shared.majority if work.shared else None
        rows, width = draws[0](ALL).shape
        merged[name] = merge_entries(thin, weights, rule.election, rows, width, majority)
    delta = space.finish(merged, rule.iso)
    if rule.space == "factor" and rule.sides == "raw":
        assert isinstance(delta, Pair)
        delta = Pair(delta.a_RK, delta.b_NR * work.first_scale)
    return Result(delta)


def survey(works: Works, rule: Rule, terms: int) -> Survey | None:
    """The pass over all modules that rules of scope `adapter` need before the merge itself.

    Modules that an adapter lacks are zeros of its flat vector: they count for its density.
    """
    if rule.scope != "adapter" or rule.kind != "magnitude":
        return None
    entries, how = 0, [Sparsity("magnitude")] * terms
    for work in works():
        for draws in _space(work, rule).parts.values():
            entries += draws[0](ALL).numel()
        for part in work.parts:
            how[part.index] = rule.sparsity(part)

    def stream() -> Iterator[dict[int, torch.Tensor]]:
        for work in works():
            for draws in _space(work, rule).parts.values():
                for part, draw in zip(work.parts, draws, strict=True):
                    whole = draw(ALL)
                    for block in row_blocks(*whole.shape):
                        yield {part.index: whole[block]}

    thresholds = kth_magnitudes(stream, [max(kept_count(h, entries), 1) for h in how])
    found = Survey(thresholds, None)
    if not rule.majority or rule.sign == "none":
        return found
    votes = 0.0
    for work in works():
        surveyed = replace(work, shared=found)
        for name, draws in _space(work, rule).parts.items():
            thin = _thinned(surveyed, rule, name, draws)
            weights = [part.weight for part in work.parts]
            for block in row_blocks(*draws[0](ALL).shape):
                votes += sign_votes(thin, weights, rule.sign, block)
    return Survey(thresholds, float((votes > 0) - (votes < 0)))


def _space(work: Work, rule: Rule) -> Space:
    unscaled = rule.space == "factor"
    pairs = [part.raw if unscaled else part.pair for part in work.parts]
    return SPACES[rule.space](pairs, work.module)


def _weight(part: Part, rule: Rule, name: str) -> float:
    if rule.space != "factor":
        return part.weight
    weight = part.weight if rule.sides == "raw" else part.weight * part.scale
    alpha, beta = side_weights(weight, rule.sides)
    return alpha if name == "lora_A" else beta


def _thinned(work: Work, rule: Rule, name: str, draws: list[Draw]) -> list[Draw]:
    return [
        _thin(draw, _mask(work, rule, name, part, draw))
        for part, draw in zip(work.parts, draws, strict=True)
    ]


def _thin(draw: Draw, mask: Mask) -> Draw:
    return lambda rows: mask.apply(draw(rows), rows)


def _mask(work: Work, rule: Rule, name: str, part: Part, draw: Draw) -> Mask:
    key = f"{work.module}.{name}.{part.name}"
    given = None
    if work.masks is not None and rule.kind in ("random", "della"):
        given = work.masks.get(key)
        if given is None and part.settings["density"] < 1:
            raise AdapterError(
                "missing_tensor", "a stored mask is missing", seen=key,
                fix="store one mask per module, part and adapter, or none at all",
            )  # fmt: skip
    threshold = work.shared.thresholds[part.index] if work.shared else None
    seed = work.settings["seed"]
    return sparsify(
        draw(ALL), rule.sparsity(part), lambda: generator(seed, key), given, threshold
    )  # fmt: skip
