"""run_recipe(): read what a recipe names, merge, and hold the result against the limits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_lora_ext.adapters.folder import CONFIG
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors
from vllm_lora_ext.merging.merge import Merged, Progress, Term, merge
from vllm_lora_ext.merging.ops.truncate import truncate
from vllm_lora_ext.merging.recipes.schema import (
    PIPELINE,
    Learned,
    Model,
    Recipe,
)
from vllm_lora_ext.merging.recipes.steps import run_steps
from vllm_lora_ext.merging.recipes.watch import Cancel, Watch
from vllm_lora_ext.merging.recipes.weights import own_of, plain
from vllm_lora_ext.merging.soups.files import soup_folders
from vllm_lora_ext.merging.soups.load import load_soups

Locate = Callable[[str], Path]


def run_recipe(
    recipe: Recipe,
    locate: Locate,
    *,
    max_rank: int | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Merged:
    """Merge as a recipe says; nothing is written.

    Args:
        locate: a name of `recipe.inputs()` → its folder or file.
        max_rank: what a server can hold; above it `output.on_overflow` decides.
        progress: called with (modules done, all modules, module); for a pipeline with steps.
        cancel: asked before every module and every reading; true ends the merge.
    Raises:
        AdapterError: `rank_too_large`, `setting_mismatch` (base models), `cancelled`; those of
            reading adapters and of `merge`.
    """
    watch = Watch(progress, cancel)
    if recipe.merge_method == PIPELINE:
        merged = run_steps(recipe, locate, watch)
    else:
        merged = _merge(recipe, locate, watch)
    if recipe.base_model:
        factors = dataclasses.replace(merged.factors, base_model=recipe.base_model)
        merged = dataclasses.replace(merged, factors=factors)
    return _fit(merged, recipe, max_rank)


def _merge(recipe: Recipe, locate: Locate, watch: Watch) -> Merged:
    terms = _terms(recipe.models, locate, watch)
    for model, term in zip(recipe.models, terms, strict=True):
        watch.check_base(recipe.base_model, term.factors, model.model)
    parameters, output = dict(recipe.parameters), recipe.output
    if output.rank and output.on_overflow != "error":
        parameters["rank"] = output.rank
    if output.energy:
        parameters["energy"] = output.energy
    masks = _masks(locate(recipe.masks)) if recipe.masks else None
    return merge(recipe.merge_method, terms, parameters, masks=masks, progress=watch.module)


def _terms(models: Sequence[Model], locate: Locate, watch: Watch) -> list[Term]:
    learned = _learned(models, locate)
    tails = [os.path.basename(os.path.normpath(model.model)) for model in models]
    terms = []
    for i, model in enumerate(models):
        watch.ask()
        # Adapters of one last name part would draw alike: then the whole name counts.
        name = model.name or (tails[i] if tails.count(tails[i]) == 1 else model.model)
        own = own_of(model.parameters)
        weight = model.parameters.weight
        if not isinstance(weight, Learned):
            terms.append(Term(load_factors(locate(model.model)), plain(weight), name, own))
            continue
        folder, term = learned[i]
        # The scalars make such a folder more than an ordinary one, so it is not read twice.
        same = os.path.realpath(folder) == os.path.realpath(locate(model.model))
        factors = term.factors if same else load_factors(locate(model.model))
        terms.append(Term(factors, term.weight, name, own))
    return terms


def _learned(models: Sequence[Model], locate: Locate) -> dict[int, tuple[Path, Term]]:
    """Place in the recipe → the folder and the term with its learned weights.

    The models of one run are weighed against each other; so are all that name single adapters.
    """
    groups: dict[str, list[tuple[int, Path]]] = {}
    for i, model in enumerate(models):
        weight = model.parameters.weight
        if isinstance(weight, Learned):
            where = locate(weight.folder)
            single = (where / CONFIG).is_file()
            groups.setdefault("" if single else weight.folder, []).append((i, where))
    found = {}
    for run, members in groups.items():
        folders = [where for _, where in members]
        if run:
            folders = soup_folders(folders[0])
            if len(folders) != len(members):
                raise AdapterError(
                    "setting_mismatch", f"the weights in '{run}' were learned together",
                    seen=f"{len(members)} of the models", limit=f"{len(folders)}, in their order",
                    fix="name the run for each of its adapters",
                )  # fmt: skip
        for (i, _), folder, term in zip(members, folders, load_soups(folders), strict=True):
            found[i] = (folder, term)
    return found


def _masks(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise AdapterError("not_found", "there is no file of masks", seen=str(path)) from error
    except (SafetensorError, OSError) as error:
        raise AdapterError("bad_safetensors", f"the masks cannot be read: {error}") from error


def _fit(merged: Merged, recipe: Recipe, max_rank: int | None) -> Merged:
    """Pipelines get the rank that was asked for; then the limits are looked at."""
    output, cuts = recipe.output, recipe.output.on_overflow != "error"
    if recipe.merge_method == PIPELINE and (output.energy or (cuts and output.rank)):
        merged = _cut(merged, output.rank if cuts else None, output.energy)
    limits = [max_rank, None if cuts else output.rank]
    limit = min((one for one in limits if one is not None), default=None)
    rank = merged.factors.rank
    if limit is None or rank <= limit:
        return merged
    if output.on_overflow != "truncate":
        raise AdapterError(
            "rank_too_large", "the merged adapter has more ranks than there is room for",
            seen=rank, limit=limit, fix=f"set output.rank to {limit} or on_overflow to truncate in"
            " the recipe, or raise --max-lora-rank",
        )  # fmt: skip
    cut = _cut(merged, limit, None)
    warning = f"cut from rank {rank} to {limit}, as output.on_overflow allows"
    report = dataclasses.replace(cut.report, warnings=[*cut.report.warnings, warning])
    return dataclasses.replace(cut, report=report)


def _cut(merged: Merged, rank: int | None, energy: float | None) -> Merged:
    modules, reports = {}, dict(merged.report.modules)
    for name, pair in merged.factors.modules.items():
        modules[name], kept = truncate(pair, rank, energy)
        before = reports[name]
        # Orthogonal cuts, one after the other: the shares multiply.
        reports[name] = dataclasses.replace(
            before, rank=modules[name].rank, kept_energy=before.kept_energy * kept
        )
    exact = merged.report.exact and all(r.kept_energy > 1 - 1e-6 for r in reports.values())
    report = dataclasses.replace(merged.report, modules=reports, exact=exact)
    left = {name: pair for name, pair in modules.items() if pair.rank}
    return Merged(dataclasses.replace(merged.factors, modules=left), report)
