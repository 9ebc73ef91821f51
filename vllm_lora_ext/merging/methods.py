"""The table of methods: every name that a recipe, a request or a command may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from vllm_lora_ext.adapters.outside import with_packages
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import plans
from vllm_lora_ext.merging.entrywise import Rule
from vllm_lora_ext.merging.parameters import (
    ALIASES,
    OF_ADAPTERS,
    Parameter,
    check_parameter,
    check_parameters,
)
from vllm_lora_ext.merging.plans import Planner

# Packages may bring methods of their own: an entry point of this group names a `Method`.
ENTRY_POINTS = "vllm_lora_ext.merge_methods"


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Args:
        name: as recipes and requests spell it.
        title: one line.
        url: paper or code that defines it.
        exact: the result is the sum of the weighted deltas, to rounding.
        why: what is exact or lost.
        plan: its arithmetic.
        parameters: allowed names with their defaults; None means that the method decides.
        only: parameters with fewer choices here than elsewhere; `compat` names the flavours.
        tools: flavour → the defaults that its tool has in place of these.
        commutes: the order of the adapters does not matter, whatever the parameters.
        whole: flavours that merge whole weight matrices, which takes minutes.
        brings: parameters of its own, beside those that every method may have.
        version: of a package's method, raised when it gives other numbers than before: what was
            merged by another one is not found again.
    """

    name: str
    title: str
    url: str
    exact: bool
    why: str
    plan: Planner
    parameters: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    commutes: bool = True
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    brings: Mapping[str, Parameter] = field(default_factory=dict)
    version: int = 0

    def defaults(self, compat: object = None) -> Mapping[str, Any]:
        """Of all parameters, under a flavour."""
        return {**self.parameters, **self.tools.get(str(compat), {})}

    def settings(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """All parameters of a merge, checked, under their own names, defaults filled in.

        Args:
            given: what the user said; a null value counts as not said.
            where: whose parameters they are, for messages.
        Raises:
            AdapterError: `unknown_key`, `bad_value`.
        """
        defaults = self.defaults(given.get("compat"))
        return check_parameters(given, defaults, where, self.only, self.brings)

    def said(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Only what was said, in one spelling and order. Raises as `settings`."""
        checked = self.settings(given, where)
        said = {ALIASES.get(key, key) for key, value in given.items() if value is not None}
        return {key: checked[key] for key in sorted(said)}

    def own(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What one adapter says for itself of the parameters it may have of its own.

        Raises:
            AdapterError: `unknown_key`, `bad_value`.
        """
        allowed = [key for key in OF_ADAPTERS if key in self.parameters]
        for key, value in given.items():
            if key not in allowed:
                raise AdapterError(
                    "unknown_key", f"{where} cannot have its own '{key}'", seen=value,
                    limit=["weight", *allowed], fix=f"remove '{key}'",
                )  # fmt: skip
        return {k: check_parameter(k, v, where) for k, v in given.items() if v is not None}


_FIT = {"rank": None, "energy": None, "lambda": 1.0, "layers": None}
_SUM = {**_FIT, "normalize": False}
_BASIS = {**_FIT, "space": "core", "isotropise": False, "compat": None}
_BASIS_ONLY = {"space": ("core", "knots", "knots_v", "full"), "compat": ("core_space",)}
_PEFT = "https://github.com/huggingface/peft"
_TIES = "https://arxiv.org/abs/2306.01708"
_DARE = "https://arxiv.org/abs/2311.03099"
_DELLA = "https://arxiv.org/abs/2406.11617"
_CRUMBS = "https://arxiv.org/abs/2312.06795"
_ENTRIES = "entries are dropped or outvoted; what is left is served exactly in core space"


# What each way to thin out reads, with the defaults of methods that say nothing else. mergekit's
# `rescale` is a switch of all its methods.
_READ: dict[str, dict[str, Any]] = {
    "none": {},
    "magnitude": {"density": 1.0, "rescale": None},
    "random": {"density": 1.0, "rescale": None, "seed": 0},
    "della": {"density": 1.0, "rescale": None, "seed": 0, "epsilon": 0.1},
    "outliers": {"density": 1.0, "rescale": None, "gamma": 0.01},
}
_MERGEKIT = {"density": 1.0, "epsilon": 0.15}


def _entrywise(
    name: str, title: str, url: str, rules: Mapping[str | None, Rule], **defaults: Any
) -> Method:
    """A row for an entry-wise merge with its flavours."""
    iso = any(rule.iso for rule in rules.values())
    parameters = {
        **_FIT, "space": None, "sign": None, "divide": None, "join": None, "normalize": None,
        "compat": None, **({} if iso else {"isotropise": False}),
        **{key: value for rule in rules.values() for key, value in _READ[rule.kind].items()},
        **({"seed": 0} if "drop" in defaults else {}), **defaults,
    }  # fmt: skip
    flavours = tuple(flavour for flavour in rules if flavour)
    return Method(
        name, title, url, False, _ENTRIES, plans.entrywise(rules), parameters,
        {"compat": flavours}, commutes=not any(rule.sides == "raw" for rule in rules.values()),
        tools={"mergekit": {k: v for k, v in _MERGEKIT.items() if k in parameters}},
        whole=frozenset(name for name, rule in rules.items() if name and rule.space == "full"),
    )  # fmt: skip


def _magnitude(**fields: Any) -> Rule:
    return Rule("magnitude", **fields)


_VOTE: dict[str, Any] = {"sign": "total", "divide": "voters"}
_ORIGINAL: dict[str, Any] = {**_VOTE, "extra": True, "majority": True}
_MERGEKIT_VOTE: dict[str, Any] = {"space": "full", "sign": "weighted"}
_KNOTS = _magnitude(space="knots", scope="adapter", **_ORIGINAL)
_TIES_RULES: dict[str | None, Rule] = {
    None: _magnitude(**_VOTE),
    "peft": _magnitude(space="factor", **_VOTE),
    "lorax": _magnitude(space="factor", sides="raw", **_VOTE),
    "mergekit": _magnitude(divide="weights", **_MERGEKIT_VOTE),
    "ties_original": _magnitude(space="full", scope="adapter", **_ORIGINAL),
    "knots": _KNOTS,
    "core_space": _magnitude(**_ORIGINAL),
}
_DARE_TIES_RULES: dict[str | None, Rule] = {
    None: Rule("random", rescale="density", **_VOTE),
    "peft": Rule("random", "factor", rescale="density", **_VOTE),
    "lorax": Rule("random", "factor", sides="raw", **_VOTE),
    "mergekit": Rule("random", rescale="l1", **_MERGEKIT_VOTE),
}
_DARE_LINEAR_RULES: dict[str | None, Rule] = {
    None: Rule("random", rescale="density"),
    "peft": Rule("random", "factor", rescale="density"),
    "lorax": Rule("random", "factor", sides="raw"),
    "mergekit": Rule("random", "full", rescale="l1"),
    "mergelm": Rule("random", "full", rescale="density"),
    "core_space": Rule("random", rescale="density"),
}
_PRUNE_RULES: dict[str | None, Rule] = {
    None: _magnitude(),
    "peft": _magnitude(space="factor"),
    "mergelm": _magnitude(space="full", rescale="density", up=True),
}
_DELLA_RULES: dict[str | None, Rule] = {
    None: Rule("della", rescale="density", **_VOTE),
    "mergekit": Rule("della", rescale="l1", divide="weights", **_MERGEKIT_VOTE),
}
_DELLA_LINEAR_RULES: dict[str | None, Rule] = {
    None: Rule("della", rescale="density"), "mergekit": Rule("della", "full", rescale="l1")
}  # fmt: skip
_CRUMBS_RULES: dict[str | None, Rule] = {
    None: Rule("outliers"), "mergekit": Rule("outliers", "full")
}  # fmt: skip
_CRUMBS_TIES_RULES: dict[str | None, Rule] = {
    None: Rule("outliers", **_VOTE), "mergekit": Rule("outliers", **_MERGEKIT_VOTE)
}  # fmt: skip

_ROWS = (
    Method("cat", "sum of the weighted deltas, ranks side by side", _PEFT, True,
           "Σ w B A, rank Σ r", plans.sum_of_products, {**_SUM, "compat": None},
           {"compat": ("peft",)}),
    Method("linear", "sum of the weighted deltas; with compat, what a tool calls linear", _PEFT,
           True, "exact without compat; with it, factors are added, and cross terms come in",
           plans.linear, {**_SUM, "compat": None},
           {"compat": ("peft", "lorax", "lorahub", "soups")}, commutes=False),
    Method("svd", "sum of the weighted deltas, cut to a lower rank", _PEFT, False,
           "the best approximation of its rank; the report says what is kept",
           plans.truncated_sum, {**_SUM, "svd_clamp": None, "compat": None},
           {"compat": ("peft",)}),
    _entrywise("ties", "TIES: trim, elect signs, disjoint mean", _TIES, _TIES_RULES, density=0.2,
               drop=0.0, svd_clamp=None),
    _entrywise("knots_ties", "TIES over all modules at once in KnOTS space",
               "https://github.com/gstoica27/KnOTS", {None: _KNOTS}, density=0.2,
               drop=0.0),
    _entrywise("knots_plain_v_ties", "TIES on the plain V of KnOTS space, module by module",
               "https://github.com/apanariello4/core-space-merging",
               {None: _magnitude(space="knots_v", **_ORIGINAL)}, density=0.2, drop=0.0),
    _entrywise("dare_ties", "DARE's random dropping, then TIES' election", _DARE,
               _DARE_TIES_RULES, density=0.5, svd_clamp=None),
    _entrywise("dare_linear", "DARE's random dropping, then the weighted sum", _DARE,
               _DARE_LINEAR_RULES, density=0.5, svd_clamp=None),
    _entrywise("magnitude_prune", "largest entries only, then the weighted sum", _PEFT,
               _PRUNE_RULES, density=0.5, svd_clamp=None),
    _entrywise("della", "DELLA: dropping by magnitude rank, then election", _DELLA, _DELLA_RULES,
               density=0.5),
    _entrywise("della_linear", "DELLA's dropping, then the weighted sum", _DELLA,
               _DELLA_LINEAR_RULES, density=0.5),
    _entrywise("breadcrumbs", "neither outliers nor the smallest entries", _CRUMBS,
               _CRUMBS_RULES, density=0.9),
    _entrywise("breadcrumbs_ties", "breadcrumbs, then election", _CRUMBS, _CRUMBS_TIES_RULES,
               density=0.9),
    _entrywise("iso", "Iso-C: all singular values of the sum become their mean",
               "https://arxiv.org/abs/2502.04959", {None: Rule("none", iso=True),
               "core_space": Rule("none", iso=True)}),
    Method("tsv", "TSV-Merge: top singular directions, orthogonal across adapters",
           "https://arxiv.org/abs/2412.00081", False, "small directions are dropped, the rest"
           " turned; served exactly in core space", partial(plans.bases, method="tsv"),
           {**_BASIS, "keep": None}, _BASIS_ONLY),
    Method("cart", "CART: the mean plus low-rank rests", "https://arxiv.org/abs/2412.12153", False,
           "differences to the mean are cut in rank; served exactly in core space",
           partial(plans.bases, method="cart"), {**_BASIS, "keep": 0.3, "strength": 0.5},
           _BASIS_ONLY),
    Method("lego", "LoRA-LEGO: clusters of ranks", "https://arxiv.org/abs/2409.16167", False,
           "exact when k is at least the number of ranks; otherwise a cluster's ranks share one",
           plans.lego,
           {**_FIT, "k": None, "gauge": "balanced", "parameter_reweighting": "none",
            "output_reweighting": False, "init": "farthest", "restarts": 8, "seed": 0}),
    Method("lorahub", "LoraHub: weights found by search, on A and on B",
           "https://github.com/sail-sg/lorahub", False, "(Σ w B)(Σ w A): cross terms come in",
           lambda settings, terms: plans.factors_linear("raw"), _FIT, commutes=False),
    Method("robustmerge", "RobustMerge: thinned-out factors, rescaled rank by rank",
           "https://github.com/AuroraZengfh/RobustMerge", False, "factors are thinned out and"
           " added, the first adapter's scale holds for all", plans.robust,
           {**_FIT, "mask_ratio": 0.2, "att_ratio": 0.2, "fuse_weight": 2.0}, commutes=False),
    Method("soups", "LoRA Soups CAT: learned weights per module",
           "https://github.com/aksh555/LoRA-Soups", True, "exact in mode cat; mode linear adds"
           " factors", plans.soups, {**_FIT, "mode": "cat"}),
    Method("dps", "ScaleZero: the first stages of a curriculum, each times its gate",
           "https://github.com/opendilab/LightZero", True, "exact while the base's scale is 1",
           plans.dps, {**_FIT, "stage": None}, commutes=False),
    Method("select_layers", "only some layers (LayRA, Flexora)",
           "https://github.com/kithib/Flexora", True, "exact on the layers that stay",
           plans.one_adapter(plans.keep_layers), {**_FIT, "include": None, "exclude": None}),
    Method("select_ranks", "only some ranks", "https://arxiv.org/abs/2303.10512", True,
           "exact on the ranks that stay", plans.one_adapter(plans.keep_ranks),
           {**_FIT, "indices": None, "top": None}, commutes=False),
    Method("normalise", "the same delta in a fixed form", "https://arxiv.org/abs/2409.16167", True,
           "only its form changes", plans.one_adapter(plans.fix_gauge), {**_FIT, "form": "svd"}),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


@cache
def all_methods() -> Mapping[str, Method]:
    """Every method by name: the table's, then those of installed packages.

    Raises:
        AdapterError: `bad_method`, an entry point cannot be loaded or is no Method.
    """
    rows = with_packages(_ROWS, Method, ENTRY_POINTS, _bad_method)
    return {method.name: method for method in rows}


def _bad_method(what: str, why: str) -> AdapterError:
    return AdapterError(
        "bad_method", f"an installed package brings a merge method that cannot be used: {why}",
        seen=what, limit=f"a Method under the entry point group {ENTRY_POINTS}",
        fix="mend or uninstall that package",
    )  # fmt: skip


def find_method(name: str) -> Method:
    """The method of a name. Raises AdapterError `bad_value`, `bad_method`."""
    if name not in all_methods():
        raise AdapterError(
            "bad_value", "there is no merge method of this name", seen=name,
            limit=list(all_methods()), fix="choose one of them",
        )  # fmt: skip
    return all_methods()[name]
