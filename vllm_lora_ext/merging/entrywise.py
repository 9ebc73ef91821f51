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
    BY_NORM,
    Divide,
    Draw,
    Election,
    Join,
    Sign,
    Voters,
    merge_entries,
    norms_of,
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
from vllm_lora_ext.merging.work import ModuleTerm, Result, Work, Works


@dataclass(frozen=True)
class Rule:
    """One flavour of an entry-wise merge.

    Args:
        space: where entries are compared.
        kind, rescale, extra, up: see `Sparsity`.
        sign, divide, majority, join: see `Election`.
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
    join: Join = "voters"
    scope: Literal["tensor", "adapter"] = "tensor"
    sides: Mode = "peft"
    iso: bool = False

    def election(self, absent: int) -> Election:
        return Election(self.sign, self.divide, self.majority, self.join, absent)

    def sparsity(self, part: ModuleTerm) -> Sparsity:
        s = part.settings
        read = {key: s[key] for key in ("density", "epsilon", "gamma") if key in s}
        return Sparsity(self.kind, rescale=self.rescale, extra=self.extra, up=self.up, **read)


class Survey(NamedTuple):
    """What is counted over all modules: thresholds and norms per adapter, and the sign of most
    entries."""

    thresholds: list[float]
    majority: float | None = None
    norms: list[float] | None = None


def merge_entrywise(work: Work, rule: Rule, terms: int) -> Result:
    """One module by a rule; random kinds draw by (seed, module, adapter, part).

    Args:
        terms: how many adapters there are, those without the module too.
    Raises:
        AdapterError: `rank_mismatch` (factor space), `missing_tensor` and `shape_mismatch` of
            stored masks.
    """
    space = _space(work, rule)
    merged = {}
    for name, draws in space.parts.items():
        voters = _voters(work, rule, name, draws)
        majority = work.shared.majority if work.shared else None
        rows, width = draws[0](ALL).shape
        how = rule.election(terms - len(work.parts))
        merged[name] = merge_entries(voters, how, rows, width, majority)
    delta = space.finish(merged, rule.iso)
    if rule.space == "factor" and rule.sides == "raw":
        assert isinstance(delta, Pair)
        delta = Pair(delta.a_RK, delta.b_NR * work.first_scale)
    return Result(delta)


def survey(works: Works, rule: Rule, terms: int) -> Survey | None:
    """The passes over all modules that rules of scope `adapter` need before the merge itself.

    Modules that an adapter lacks are zeros of its flat vector: they count for its density.
    """
    if rule.scope != "adapter" or rule.kind != "magnitude":
        return None
    found = Survey(_thresholds(works, rule, terms))
    if rule.sign in BY_NORM:
        found = found._replace(norms=_norms(works, rule, terms, found))
    if not rule.majority or rule.sign == "none":
        return found
    votes = 0.0
    for voters, block in _every_block(works, rule, found):
        votes += sign_votes(voters, rule.sign, block)
    return found._replace(majority=float((votes > 0) - (votes < 0)))


def _thresholds(works: Works, rule: Rule, terms: int) -> list[float]:
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

    return kth_magnitudes(stream, [max(kept_count(h, entries), 1) for h in how])


def _norms(works: Works, rule: Rule, terms: int, found: Survey) -> list[float]:
    squares = [0.0] * terms
    for work in works():
        surveyed = replace(work, shared=found)
        for name, draws in _space(work, rule).parts.items():
            thin = _voters(surveyed, rule, name, draws).draws
            blocks = row_blocks(*draws[0](ALL).shape)
            for part, norm in zip(work.parts, norms_of(thin, blocks), strict=True):
                squares[part.index] += norm**2
    return [square**0.5 for square in squares]


def _every_block(works: Works, rule: Rule, found: Survey) -> Iterator[tuple[Voters, slice]]:
    for work in works():
        surveyed = replace(work, shared=found)
        for name, draws in _space(work, rule).parts.items():
            voters = _voters(surveyed, rule, name, draws)
            for block in row_blocks(*draws[0](ALL).shape):
                yield voters, block


def _space(work: Work, rule: Rule) -> Space:
    unscaled = rule.space == "factor"
    pairs = [part.raw if unscaled else part.pair for part in work.parts]
    space = SPACES[rule.space](pairs, work.module)
    if not work.settings.get("drop"):
        return space
    parts = {
        name: [
            _thin(draw, _dropped(work, name, part, draw))
            for part, draw in zip(work.parts, draws, strict=True)
        ]
        for name, draws in space.parts.items()
    }
    return replace(space, parts=parts)


def _dropped(work: Work, name: str, part: ModuleTerm, draw: Draw) -> Mask:
    """DARE, before anything else is done to an adapter's entries."""
    stay = Sparsity("random", 1 - work.settings["drop"], rescale="density")
    key = f"{work.module}.{name}.{part.name}"
    return sparsify(
        draw(ALL), stay, lambda: generator(work.settings["seed"], key), _stored(work, key)
    )  # fmt: skip


def _voters(work: Work, rule: Rule, name: str, draws: list[Draw]) -> Voters:
    thin = [
        _thin(draw, _mask(work, rule, name, part, draw))
        for part, draw in zip(work.parts, draws, strict=True)
    ]
    weights = [_weight(part, rule, name) for part in work.parts]
    norms = work.shared.norms if work.shared else None
    return Voters(thin, weights, [norms[part.index] for part in work.parts] if norms else ())


def _weight(part: ModuleTerm, rule: Rule, name: str) -> float:
    if rule.space != "factor":
        return part.weight
    weight = part.weight if rule.sides == "raw" else part.weight * part.scale
    alpha, beta = side_weights(weight, rule.sides)
    return alpha if name == "lora_A" else beta


def _thin(draw: Draw, mask: Mask) -> Draw:
    return lambda rows: mask.apply(draw(rows), rows)


def _mask(work: Work, rule: Rule, name: str, part: ModuleTerm, draw: Draw) -> Mask:
    key = f"{work.module}.{name}.{part.name}"
    drawn = rule.kind in ("random", "della")
    given = _stored(work, key, needed=part.settings["density"] < 1) if drawn else None
    threshold = work.shared.thresholds[part.index] if work.shared else None
    return sparsify(
        draw(ALL), rule.sparsity(part), lambda: generator(work.settings["seed"], key), given,
        threshold,
    )  # fmt: skip


def _stored(work: Work, key: str, needed: bool = True) -> torch.Tensor | None:
    if work.masks is None:
        return None
    if needed and key not in work.masks:
        raise AdapterError(
            "missing_tensor", "a stored mask is missing", seen=key,
            fix="store one mask per module, part and adapter, or none at all",
        )  # fmt: skip
    return work.masks.get(key)
