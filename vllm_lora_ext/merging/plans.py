"""Plans: how each family of methods merges one module, from its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.entrywise import Rule, merge_entrywise, survey
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.bases import cart, tsv
from vllm_lora_ext.merging.ops.concat import concat
from vllm_lora_ext.merging.ops.elect import ALL
from vllm_lora_ext.merging.ops.factor_linear import Mode, factor_linear
from vllm_lora_ext.merging.ops.lego import Lego, cluster_ranks
from vllm_lora_ext.merging.ops.normalise import normalise
from vllm_lora_ext.merging.ops.robust import robustmerge
from vllm_lora_ext.merging.ops.scale import scale
from vllm_lora_ext.merging.ops.seeds import generator
from vllm_lora_ext.merging.ops.select import in_layers, select_ranks
from vllm_lora_ext.merging.ops.spaces import SPACES, same_rank
from vllm_lora_ext.merging.work import Result, Work, Works

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a merge runs.

    Args:
        merge: one module.
        survey: the pass over all modules before it, if the method needs one; gets the modules
            anew at every call and the number of terms.
        rank: largest rank of the result where the user gave none.
        normalise: weights are divided by the sum of all of them first.
        clamp: PEFT's `svd_clamp`, for the cut to a lower rank.
    """

    merge: Callable[[Work], Result]
    survey: Callable[[Works, int], Any] | None = None
    rank: int | None = None
    normalise: bool = False
    clamp: float | None = None


@dataclass(frozen=True)
class Terms:
    """What a plan may know of the inputs: the largest rank of each, and what PEFT takes for it."""

    ranks: Sequence[int]
    config_ranks: Sequence[int]


Planner = Callable[[Settings, Terms], Plan]


def sum_of_products(settings: Settings, terms: Terms) -> Plan:
    """Σ w_i D_i by concat."""

    def merge(work: Work) -> Result:
        return Result(concat([scale(part.pair, part.weight) for part in work.parts]))

    return Plan(merge, normalise=bool(settings.get("normalize")))


def truncated_sum(settings: Settings, terms: Terms) -> Plan:
    """Σ w_i D_i, cut to the largest rank of an input unless rank or energy say otherwise."""
    free = settings["energy"] is not None
    ranks = terms.config_ranks if settings["compat"] == "peft" else terms.ranks
    return replace(
        sum_of_products(settings, terms), rank=None if free else max(ranks), clamp=_clamp(settings)
    )


def _clamp(settings: Settings) -> float | None:
    clamp: float | None = settings.get("svd_clamp")
    if clamp is not None and settings["compat"] != "peft":
        raise AdapterError(
            "bad_value", "'svd_clamp' is PEFT's: it cuts off entries of an SVD, whose signs mean"
            " nothing", seen=clamp, limit="compat: peft", fix="remove 'svd_clamp'",
        )  # fmt: skip
    return clamp


def linear(settings: Settings, terms: Terms) -> Plan:
    """The sum of products, or what a tool calls linear."""
    modes: dict[str, Mode] = {"peft": "peft", "lorax": "raw", "lorahub": "raw", "soups": "b_only"}
    flavour = settings["compat"]
    if flavour is None:
        return sum_of_products(settings, terms)
    if settings.get("normalize"):
        raise AdapterError(
            "bad_value", "'normalize' divides weights of deltas; this tool adds up factors",
            seen=flavour, limit="no compat", fix="remove 'normalize' or 'compat'",
        )  # fmt: skip
    return factors_linear(modes[flavour])


def factors_linear(mode: Mode) -> Plan:
    """Sums of factors; `raw` has one scale for all, that of the first adapter."""

    def merge(work: Work) -> Result:
        pairs = [part.raw for part in work.parts]
        same_rank(pairs, work.module)
        if mode == "raw":
            pair = factor_linear(pairs, [part.weight for part in work.parts], mode)
            return Result(Pair(pair.a_RK, pair.b_NR * work.first_scale))
        weights = [part.weight * part.scale for part in work.parts]
        return Result(factor_linear(pairs, weights, mode))

    return Plan(merge)


def entrywise(rules: Mapping[str | None, Rule]) -> Planner:
    """Merges by entries; `rules` has one per flavour, None for this project's own."""

    def plan(settings: Settings, terms: Terms) -> Plan:
        flavour = settings.get("compat")
        rule = _overridden(rules[flavour], settings)
        if flavour == "peft" and len(terms.ranks) == 1:
            return factors_linear("peft")  # PEFT ignores the type when there is one adapter
        clamp = _clamp(settings)
        dense = flavour == "peft" and rule.space == "full"
        if clamp is not None and not dense:
            raise AdapterError(
                "bad_value", "'svd_clamp' cuts off entries of an SVD, and factors have none",
                seen=clamp, limit="space: full", fix="remove 'svd_clamp', or say space: full",
            )  # fmt: skip
        # Where all have a say on every entry, those without the module have it as well.
        normalise = rule.sign == "none" and rule.divide == "weights"
        rule = replace(rule, divide="none") if normalise else rule
        return Plan(
            lambda work: merge_entrywise(work, rule, len(terms.ranks)),
            lambda works, count: survey(works, rule, count),
            max(terms.config_ranks) if dense and settings["energy"] is None else None,
            normalise,
            clamp if dense else None,
        )

    return plan


def _overridden(rule: Rule, settings: Settings) -> Rule:
    said = {key: settings[key] for key in ("space", "sign", "divide", "join") if settings.get(key)}
    if settings.get("normalize") is not None:
        if "divide" in said:
            raise AdapterError(
                "bad_value", "'normalize' and 'divide' are both given", seen=said["divide"],
                limit="one of them", fix="remove 'normalize'",
            )  # fmt: skip
        said["divide"] = "weights" if settings["normalize"] else "none"
    rescale = settings.get("rescale")
    if isinstance(rescale, bool):
        mergekit = settings.get("compat") == "mergekit"
        rescale = ("l1" if mergekit else "density") if rescale else "none"
    if rescale:
        said["rescale"] = rescale
    if settings.get("isotropise"):
        said["iso"] = True
    if settings.get("compat") == "core_space" and said.get("space") == "knots":
        said["space"] = "knots_v"  # what that repository means by the word
    return replace(rule, **said)


def bases(settings: Settings, terms: Terms, method: str) -> Plan:
    """TSV, CART: whole singular directions, on the weighted cores (or KnOTS pieces, or deltas)."""
    space_name = settings["space"]
    if settings["compat"] == "core_space" and space_name == "knots":
        space_name = "knots_v"

    def merge(work: Work) -> Result:
        space = SPACES[space_name]([part.pair for part in work.parts], work.module)
        ((name, draws),) = space.parts.items()
        weighted = [draw(ALL) * part.weight for draw, part in zip(draws, work.parts, strict=True)]
        if method == "tsv":
            merged = tsv(weighted, settings["keep"])
        else:
            merged = cart(weighted, settings["keep"], settings["strength"])
        return Result(space.finish({name: merged}, settings["isotropise"]))

    return Plan(merge)


def lego(settings: Settings, terms: Terms) -> Plan:
    """Clusters of ranks."""
    how = Lego(
        settings["k"] or settings["rank"] or max(terms.ranks),
        settings["gauge"], settings["parameter_reweighting"],
        settings["output_reweighting"], settings["init"], settings["restarts"],
    )  # fmt: skip

    def merge(work: Work) -> Result:
        pairs = [scale(part.pair, part.weight) for part in work.parts]
        found = cluster_ranks(pairs, how, generator(settings["seed"], work.module))
        notes = {
            "cluster_sizes": found.sizes, "inertia": found.inertia, "gauge": how.gauge,
            "output_factor": found.factor,
        }  # fmt: skip
        return Result(found.pair, notes)

    return Plan(merge)


def robust(settings: Settings, terms: Terms) -> Plan:
    """RobustMerge on unscaled factors; the first adapter's scale for all, as it is served."""

    def merge(work: Work) -> Result:
        # A weight cannot go to one side only; RobustMerge itself has none.
        pairs = [_both_sides(part.raw, part.weight) for part in work.parts]
        same_rank(pairs, work.module)
        pair = robustmerge(
            pairs, settings["mask_ratio"], settings["att_ratio"], settings["fuse_weight"]
        )
        return Result(Pair(pair.a_RK, pair.b_NR * work.first_scale))

    return Plan(merge)


def _both_sides(pair: Pair, weight: float) -> Pair:
    root = math.sqrt(abs(weight))
    return Pair(pair.a_RK * math.copysign(root, weight), pair.b_NR * root)


def soups(settings: Settings, terms: Terms) -> Plan:
    """LoRA Soups: the terms' weights are the learned ones."""
    if settings["mode"] == "linear":
        return factors_linear("b_only")
    return sum_of_products(settings, terms)


def dps(settings: Settings, terms: Terms) -> Plan:
    """ScaleZero: the first `stage` adapters, each times its gate (the terms' weights)."""
    stage = settings["stage"] or len(terms.ranks)
    if stage > len(terms.ranks):
        raise AdapterError(
            "bad_value", "'stage' is larger than the number of stages", seen=stage,
            limit=f"1 to {len(terms.ranks)}", fix="choose a smaller stage",
        )  # fmt: skip

    def merge(work: Work) -> Result:
        pairs = [scale(p.pair, p.weight if p.index < stage else 0.0) for p in work.parts]
        return Result(concat(pairs))

    return Plan(merge)


def one_adapter(step: Callable[[Pair, str, Settings], Pair]) -> Planner:
    """Steps that change one adapter; several terms are added up first."""

    def plan(settings: Settings, terms: Terms) -> Plan:
        def merge(work: Work) -> Result:
            pair = concat([scale(part.pair, part.weight) for part in work.parts])
            return Result(step(pair, work.module, settings))

        return Plan(merge)

    return plan


def keep_layers(pair: Pair, module: str, settings: Settings) -> Pair:
    kept = in_layers(module, settings["include"], settings["exclude"] or ())
    return scale(pair, 1.0 if kept else 0.0)


def keep_ranks(pair: Pair, module: str, settings: Settings) -> Pair:
    return select_ranks(pair, settings["indices"], settings["top"])


def fix_gauge(pair: Pair, module: str, settings: Settings) -> Pair:
    return normalise(pair, settings["form"])
