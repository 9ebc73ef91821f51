"""merge(): adapters, a method and its parameters in; one adapter and a report out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.methods import Method, find_method
from vllm_lora_ext.merging.ops.scale import Weight, count_layers, resolve
from vllm_lora_ext.merging.ops.truncate import Kept, clamped, factorise, truncate
from vllm_lora_ext.merging.plans import Plan, Terms
from vllm_lora_ext.merging.work import ModuleTerm, Work

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Term:
    """One adapter of a merge.

    Args:
        factors: the adapter.
        weight: a number; a gradient over the layers; `{filter, value}` entries; or module →
            number. See `ops.scale.resolve`.
        name: for random draws, stored masks and messages; the folder's name when empty.
        parameters: this adapter's own density, epsilon or gamma.
    """

    factors: Factors
    weight: Weight = 1.0
    name: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Args:
        rank: of the result; 0 when nothing is left of it.
        kept_energy: share of the merged delta's squared norm that the cut to `rank` kept.
        notes: what the method adds (lego: cluster_sizes, inertia, gauge, output_factor).
    """

    rank: int
    kept_energy: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a merge did, for people and lock files.

    Args:
        parameters: all of them, defaults filled in, those that say nothing left out.
        exact: the result is the sum of the weighted deltas: the method says so and no cut lost
            anything.
        why: what is exact or lost.
    """

    method: str
    parameters: dict[str, Any]
    exact: bool
    why: str
    modules: dict[str, ModuleReport]
    warnings: list[str]

    @property
    def kept_energy(self) -> float:
        """The worst module's."""
        return min((module.kept_energy for module in self.modules.values()), default=1.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method, "parameters": self.parameters, "exact": self.exact,
            "why": self.why, "warnings": self.warnings,
            "modules": {
                name: {"rank": m.rank, "kept_energy": round(m.kept_energy, 9), **m.notes}
                for name, m in self.modules.items()
            },
        }  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """The merged adapter and the report."""

    factors: Factors
    report: Report


@contextmanager
def _solvable() -> Iterator[None]:
    """Numbers that overflow within a merge end in LAPACK, which calls it another thing."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise AdapterError(
            "not_finite", f"the merge's numbers become too large for an SVD: {error}",
            fix="check the weights, the parameters and the inputs' scales",
        ) from error  # fmt: skip


@_solvable()
def merge(
    method: str,
    terms: Sequence[Term],
    parameters: Mapping[str, Any] | None = None,
    *,
    masks: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge adapters, module by module; beside inputs and result, memory for one module's work.

    Args:
        method: a name of `METHODS`.
        terms: one or more adapters. A module that an adapter lacks has rank 0 there.
        parameters: see `METHODS[method].parameters` and `PARAMETERS`.
        masks: drawn masks in place of random ones, by `<module>.<part>.<adapter's name>`, part
            being core, knots, delta, lora_A or lora_B.
        progress: called with (modules done, all modules, module).
    Raises:
        AdapterError: `bad_value`, `unknown_key`, `missing_key`, `rank_mismatch`,
            `shape_mismatch`, `missing_tensor` (a mask), `not_finite`, `empty_adapter`.
    """
    row = find_method(method)
    if not terms:
        raise AdapterError("empty_adapter", "there is no adapter to merge", fix="name one or more")
    settings = row.settings(parameters or {}, f"method {method}")
    named = _named(terms)
    shapes = _shapes(named)
    ranks = [term.factors.rank for term in named]
    said = [term.factors.config_rank or term.factors.rank for term in named]
    plan = row.plan(settings, Terms(ranks, said))
    works = _Works(named, sorted(shapes), settings, row, masks)
    if plan.normalise:
        works.normalise()
    shared = None
    if plan.survey:
        shared = plan.survey(lambda: (work for work in works() if work.parts), len(named))
    modules, reports = {}, {}
    for done, work in enumerate(works(), start=1):
        kept, notes = _one(replace(work, shared=shared), plan, settings)
        if kept.pair.rank:
            modules[work.module] = kept.pair
        reports[work.module] = ModuleReport(kept.pair.rank, kept.energy, notes)
        if progress:
            progress(done, len(shapes), work.module)
    warnings = _warnings(named)
    if settings.get("compat") == "peft" and named[0].factors.rslora:
        modules, warning = _rslora_trap(method, plan, settings, named, modules)
        warnings.append(warning)
    base = next((t.factors.base_model for t in named if t.factors.base_model), "")
    used = {key: value for key, value in settings.items() if value is not None}
    # A flavour, or a mode that adds factors, is never the sum of the products.
    plain = settings.get("compat") is None and settings.get("mode") != "linear"
    whole = all(report.kept_energy > 1 - 1e-6 for report in reports.values())
    report = Report(method, used, row.exact and plain and whole, row.why, reports, warnings)
    return Merged(Factors(modules, base, f"{method} of {len(named)} adapters"), report)


class _Works:
    """The modules of a merge, made anew at every call."""

    def __init__(
        self, terms: Sequence[Term], modules: Sequence[str], settings: dict[str, Any], row: Method,
        masks: Mapping[str, torch.Tensor] | None,
    ) -> None:  # fmt: skip
        self.terms, self.modules, self.settings, self.masks = terms, modules, settings, masks
        self.layers = settings.get("layers") or count_layers(modules)
        self.own = [
            {**settings, **row.own(term.parameters, f"{term.name} under method {row.name}")}
            for term in terms
        ]
        # Every weight is looked at before the first module is merged.
        self.weights = [
            {
                name: resolve(term.weight, name, self.layers, f"the weight of {term.name}")
                for name in modules
                if name in term.factors.modules
            }
            for term in terms
        ]

    def __call__(self) -> Iterator[Work]:
        for name in self.modules:
            first = self.terms[0].factors
            scale = first.scales.get(name, first.config_scale)
            yield Work(name, self._parts(name), self.settings, scale, self.masks)

    def _parts(self, name: str) -> list[ModuleTerm]:
        return [
            ModuleTerm(
                i, term.name, term.factors.modules[name], self.weights[i][name],
                term.factors.scales.get(name, 1.0), self.own[i],
            )
            for i, term in enumerate(self.terms)
            if name in term.factors.modules and term.factors.modules[name].rank
        ]  # fmt: skip

    def normalise(self) -> None:
        """Weights of each module over their sum; a term counts where it lacks the module, too."""
        for name in self.modules:
            every = [
                resolve(term.weight, name, self.layers, f"the weight of {term.name}")
                if name in self.weights[i] or not isinstance(term.weight, Mapping) else 0.0
                for i, term in enumerate(self.terms)
            ]  # fmt: skip
            total = math.fsum(every)
            if abs(total) < 1e-8 and self.settings.get("compat") == "mergekit":
                continue
            if abs(total) < 1e-8:
                raise AdapterError(
                    "bad_value", f"the weights of {name} add up to 0 and cannot be normalised",
                    seen=every, fix="set normalize to false",
                )  # fmt: skip
            for table in self.weights:
                if name in table:
                    table[name] /= total


def _one(work: Work, plan: Plan, settings: Mapping[str, Any]) -> tuple[Kept, dict[str, Any]]:
    if not work.parts:
        return Kept(Pair(torch.zeros(0, 0), torch.zeros(0, 0)), 1.0), {}
    result = plan.merge(work)
    rank, energy = settings.get("rank") or plan.rank, settings.get("energy")
    if plan.clamp is not None and rank:
        kept = clamped(result.delta, rank, plan.clamp)
    elif isinstance(result.delta, Pair):
        kept = truncate(result.delta, rank, energy)
    else:
        kept = factorise(result.delta, rank, energy, work.module)
    pair = Pair(kept.pair.a_RK, kept.pair.b_NR * settings.get("lambda", 1.0))
    for part, tensor in pair._asdict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                "not_finite", f"the merge gives NaN or infinity in {part[0].upper()} of"
                f" {work.module}", fix="check the weights and the inputs' scales",
            )  # fmt: skip
    return Kept(pair, kept.energy), result.notes


def _named(terms: Sequence[Term]) -> list[Term]:
    def name(i: int, term: Term) -> str:
        return term.name or os.path.basename(os.path.normpath(term.factors.source or f"term {i}"))

    return [replace(term, name=name(i, term)) for i, term in enumerate(terms)]


def _shapes(terms: Sequence[Term]) -> dict[str, tuple[int, int]]:
    """(in, out) of every module. Raises AdapterError `shape_mismatch`, `empty_adapter`."""
    found: dict[str, tuple[int, int]] = {}
    for term in terms:
        for name, pair in term.factors.modules.items():
            seen = (pair.a_RK.shape[1], pair.b_NR.shape[0])
            if found.setdefault(name, seen) != seen:
                raise AdapterError(
                    "shape_mismatch", f"{name} has another size in {term.name} than in the adapters"
                    " before it", seen=f"in {seen[0]}, out {seen[1]}",
                    limit=f"in {found[name][0]}, out {found[name][1]}",
                    fix="merge adapters of one base model",
                )  # fmt: skip
    if not found:
        raise AdapterError("empty_adapter", "the adapters have no modules", fix="check the inputs")
    return found


def _warnings(terms: Sequence[Term]) -> list[str]:
    bases = sorted({term.factors.base_model for term in terms if term.factors.base_model})
    if len({base.rstrip("/").rsplit("/", 1)[-1] for base in bases}) > 1:
        return [f"the adapters name different base models: {', '.join(bases)}"]
    return []


def _rslora_trap(
    method: str, plan: Plan, settings: Mapping[str, Any], terms: Sequence[Term],
    modules: Mapping[str, Pair],
) -> tuple[dict[str, Pair], str]:  # fmt: skip
    """PEFT hands the first adapter's use_rslora on to a merge of alpha = r: sqrt(r) too strong."""
    ranks = [term.factors.config_rank or term.factors.rank for term in terms]
    summed = method == "cat" and len(terms) > 1
    rank = settings.get("rank") or plan.rank or (sum(ranks) if summed else max(ranks))
    factor = math.sqrt(rank)
    wrong = {name: Pair(pair.a_RK, pair.b_NR * factor) for name, pair in modules.items()}
    return wrong, (
        f"the first adapter is rsLoRA: PEFT serves this merge {factor:.3g} times too strong, and"
        " compat: peft repeats it; leave compat out for the right scale"
    )
