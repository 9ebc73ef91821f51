"""Pipelines: steps that read adapters, and steps that make one of earlier ones.

Everything but reading is a merge: a scale is `cat` of one adapter, a cut is `svd` of one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, load_factors, save_peft
from vllm_lora_ext.merging.generate.icm import decode_adapter
from vllm_lora_ext.merging.merge import Merged, ModuleReport, Report, Term, merge
from vllm_lora_ext.merging.recipes.parse import result_of
from vllm_lora_ext.merging.recipes.schema import (
    PIPELINE,
    Concat,
    Convert,
    Decode,
    Load,
    Merge,
    Normalise,
    Own,
    Recipe,
    Scale,
    Scatter,
    SelectLayers,
    SelectRanks,
    Truncate,
    ids_of,
)
from vllm_lora_ext.merging.recipes.watch import Watch
from vllm_lora_ext.merging.recipes.weights import own_of, plain
from vllm_lora_ext.merging.variants import Converted, read_variant
from vllm_lora_ext.merging.variants.files import Checkpoint

Locate = Callable[[str], Path]


def run_steps(recipe: Recipe, locate: Locate, watch: Watch) -> Merged:
    """A pipeline's steps, one after the other; a step's adapter is let go after its last use.

    Returns:
        The result, with the reports of all steps in one: exact only where every step is, and the
        worst share of energy on the way to each module.
    Raises:
        AdapterError: as `run_recipe`; messages of a step begin with its id.
    """
    uses = Counter(name for step in recipe.steps for name in ids_of(step))
    made: dict[str, Merged] = {}
    for done, step in enumerate(recipe.steps, start=1):
        watch.ask()
        run = Steps(recipe, locate, watch, made)
        try:
            made[step.id] = run.one(step)
        except AdapterError as error:
            raise _of_step(step.id, error) from error
        for name in ids_of(step):
            uses[name] -= 1
            if not uses[name]:
                del made[name]
        if watch.progress:
            watch.progress(done, len(recipe.steps), step.id)
    return made[result_of(recipe)]


class Steps:
    """What each step does, on the results of those before it."""

    def __init__(
        self, recipe: Recipe, locate: Locate, watch: Watch, made: Mapping[str, Merged]
    ) -> None:
        self._recipe, self._locate, self._made = recipe, locate, made
        self._watch = dataclasses.replace(watch, progress=None)  # modules do not count here

    def one(self, step: Any) -> Merged:
        kind = type(step)
        if kind is Load:
            return self._read(load_factors(self._locate(step.model)), step.model)
        if kind is Convert:
            return self._convert(step)
        if kind is Decode:
            return self._read(self._decode(step), step.generator)
        if kind is Scatter:
            return self._scatter(step)
        if kind is Concat:
            return self._merge("cat", [self._term(n, w) for n, w in step.inputs.items()], {})
        if kind is Merge:
            terms = [self._term(name, own) for name, own in step.inputs.items()]
            return self._merge(step.method, terms, step.parameters)
        if kind is Scale:
            return self._merge("cat", [self._term(step.input, step.weight)], {})
        method, keys = _OF_ONE[kind]
        given = {key: getattr(step, key) for key in keys if getattr(step, key) is not None}
        return self._merge(method, [self._term(step.input, 1.0)], given)

    def _merge(self, method: str, terms: list[Term], parameters: dict[str, Any]) -> Merged:
        merged = merge(method, terms, parameters, progress=self._watch.module)
        return joined(merged, [self._made[term.name] for term in terms])

    def _term(self, name: str, own: Any) -> Term:
        factors = self._made[name].factors
        if isinstance(own, Own):
            return Term(factors, plain(own.weight), name, own_of(own))
        return Term(factors, plain(own), name)

    def _read(self, factors: Factors, name: str, notes: Sequence[str] = ()) -> Merged:
        self._watch.check_base(self._recipe.base_model, factors, name)
        modules = {m: ModuleReport(pair.rank, 1.0) for m, pair in factors.modules.items()}
        return Merged(factors, Report(PIPELINE, {}, True, "read as it is", modules, list(notes)))

    def _convert(self, step: Convert) -> Merged:
        where: dict[str, Any] = {
            key: None if getattr(step, key) is None else self._locate(getattr(step, key))
            for key in ("base", "init", "index", "pruned")
        }
        found = read_variant(
            self._locate(step.model), rank=step.rank, settings=step.settings, **where
        )
        return self._converted(found, step.model)

    def _converted(self, found: Converted, name: str) -> Merged:
        merged = self._read(found.factors, name, found.notes)
        if found.error is None:
            return merged
        modules = {
            # What the approximation lost of the delta's squared norm.
            m: dataclasses.replace(r, kept_energy=max(0.0, 1 - found.error.get(m, 0.0) ** 2))
            for m, r in merged.report.modules.items()
        }
        why = f"{found.system} is approximated by low-rank factors"
        report = dataclasses.replace(merged.report, exact=False, why=why, modules=modules)
        return dataclasses.replace(merged, report=report)

    def _scatter(self, step: Scatter) -> Merged:
        """LoRAM's recovery reads a folder, so the step before is written into a passing one."""
        before = self._made[step.input]
        with tempfile.TemporaryDirectory(prefix="lora_ext_") as scratch:
            folder = save_peft(before.factors, Path(scratch) / "adapter")
            found = read_variant(folder, index=self._locate(step.index_dir), settings=step.settings)
        found = dataclasses.replace(
            found,
            factors=dataclasses.replace(
                found.factors, base_model=before.factors.base_model, source=before.factors.source
            ),
        )
        return joined(self._converted(found, step.input), [before])

    def _decode(self, step: Decode) -> Factors:
        latent = Checkpoint(self._locate(step.latent))
        config = self._locate(step.config)
        if not config.is_file():
            raise AdapterError("missing_file", "there is no adapter config", seen=str(config))
        return decode_adapter(
            self._locate(step.generator), self._locate(step.layout),
            parse_object(config.read_bytes(), config.name),
            latent.take("condition").float().flatten(),
            z_L=latent.take("z").float().flatten() if "z" in latent.names else None,
            seed=step.seed,
        )  # fmt: skip


_OF_ONE: dict[type, tuple[str, tuple[str, ...]]] = {
    Truncate: ("svd", ("rank", "energy")),
    SelectLayers: ("select_layers", ("include", "exclude")),
    SelectRanks: ("select_ranks", ("indices", "top")),
    Normalise: ("normalise", ("form",)),
}


def joined(merged: Merged, before: Sequence[Merged]) -> Merged:
    """The report of a step with those of the steps that it took."""
    modules = {}
    for name, own in merged.report.modules.items():
        shares = [r.kept_energy for b in before if (r := b.report.modules.get(name))]
        worst = min(shares, default=1.0)
        modules[name] = dataclasses.replace(own, kept_energy=own.kept_energy * worst)
    warnings = [text for b in before for text in b.report.warnings] + merged.report.warnings
    inexact = [b.report.why for b in before if not b.report.exact]
    report = dataclasses.replace(
        merged.report, modules=modules, warnings=list(dict.fromkeys(warnings)),
        exact=merged.report.exact and not inexact,
        why=inexact[0] if inexact and merged.report.exact else merged.report.why,
    )  # fmt: skip
    return Merged(merged.factors, report)


def _of_step(name: str, error: AdapterError) -> AdapterError:
    """The same error, the step named; its text already holds what was seen and allowed."""
    if error.message.startswith("step "):
        return error
    named = AdapterError.parse(str(error).replace(error.text, f"step '{name}': {error.text}", 1))
    assert named is not None
    return named
