"""Parameters of merges: what each may be, checked before anything is read or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.ops.scale import number

OF_ADAPTERS = ("density", "epsilon", "gamma")  # an adapter may have its own
ALIASES = {"svd_rank": "rank", "majority_sign_method": "sign"}  # PEFT's names


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Args:
        check: returns the value, or None when it is wrong.
        allowed: what it may be, in words.
        meaning: one line for the documentation.
    """

    check: Callable[[Any], Any]
    allowed: str
    meaning: str


def _real(low: float, high: float, open_low: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        inside = (low < value if open_low else low <= value) and value <= high
        return float(value) if inside else None

    return check


def _whole(low: int, high: int) -> Callable[[Any], Any]:
    return lambda value: value if type(value) is int and low <= value <= high else None


def _choice(*names: str) -> tuple[Callable[[Any], Any], str]:
    return (lambda value: value if value in names else None), ", ".join(names)


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _indices(value: Any) -> list[int] | None:
    good = isinstance(value, (list, tuple)) and all(type(i) is int and i >= 0 for i in value)
    return list(value) if good else None


def _rescale(value: Any) -> Any:
    return value if value in ("none", "density", "l1") or isinstance(value, bool) else None


PARAMETERS: dict[str, Parameter] = {
    "rank": Parameter(_whole(1, 1 << 16), "a whole number from 1", "largest rank of the result;"
                      " above it the best approximation is taken"),
    "energy": Parameter(_real(0, 1, True), "above 0 up to 1", "smallest rank that keeps this share"
                        " of the squared norm of each module"),
    "lambda": Parameter(_real(-1e6, 1e6), "a number", "multiplies the merged delta"),
    "normalize": Parameter(_flag, "true or false", "weights are divided by their sum (by the sum"
                           " of the voters' where signs are elected)"),
    "seed": Parameter(_whole(0, 2**63 - 1), "a whole number", "of random choices"),
    "density": Parameter(_real(0, 1, True), "above 0 up to 1", "share of entries that stays"),
    "epsilon": Parameter(_real(0, 1), "0 to 1", "della: half the range of the chances to stay"),
    "gamma": Parameter(_real(0, 1), "0 to 1", "breadcrumbs: share of largest entries that go"),
    "space": Parameter(*_choice("core", "knots", "knots_v", "factor", "full"),
                       "where entries are compared"),
    "drop": Parameter(lambda value: _real(0, 1)(value) if value != 1 else None, "0 to below 1",
                      "share of entries that DARE drops before anything else"),
    "sign": Parameter(*_choice("none", "total", "frequency", "weighted", "normfrac", "normmass"),
                      "how entries elect their sign"),
    "divide": Parameter(*_choice("none", "voters", "weights", "largest", "adapters", "median"),
                        "what the sum of the elected entries is divided by; largest and median"
                        " take one entry in place of the sum"),
    "join": Parameter(*_choice("voters", "all"), "whose entries are merged: those of the elected"
                      " sign, or all, and the result is turned to it"),
    "rescale": Parameter(_rescale, "none, density, l1, true or false", "how entries that stay make"
                         " up for the dropped ones"),
    "svd_clamp": Parameter(_real(0, 1), "0 to 1", "peft: quantile that cuts off an SVD's entries"),
    "compat": Parameter(lambda value: value if isinstance(value, str) else None, "a tool's name",
                        "the arithmetic of this tool where it differs"),
    "k": Parameter(_whole(1, 1 << 16), "a whole number from 1", "lego: clusters, and so the rank"),
    "gauge": Parameter(*_choice("balanced", "raw"), "lego: how the ranks are scaled before"),
    "form": Parameter(*_choice("svd", "balanced"), "normalise: what the ranks are brought to"),
    "parameter_reweighting": Parameter(*_choice("none", "mean", "rms", "max"),
                                       "lego: length that a centroid gets from its members"),
    "output_reweighting": Parameter(_flag, "true or false", "lego: times sqrt(mean rank / k)"),
    "init": Parameter(*_choice("farthest", "kmeans++"), "lego: first centroids"),
    "restarts": Parameter(_whole(1, 1000), "1 to 1000", "lego: starts of k-means++"),
    "keep": Parameter(_real(0, 1, True), "above 0 up to 1", "share of singular directions kept"),
    "strength": Parameter(_real(-1e6, 1e6), "a number", "cart: factor of the low-rank rests"),
    "isotropise": Parameter(_flag, "true or false", "the merged singular values become their mean"),
    "mask_ratio": Parameter(_real(0, 1, True), "above 0 up to 1", "robustmerge: share that stays"),
    "att_ratio": Parameter(_real(0, 1), "0 to 1", "robustmerge: upper quantile that is clamped"),
    "fuse_weight": Parameter(_real(-1e6, 1e6), "a number", "robustmerge: factor of A and of B"),
    "mode": Parameter(*_choice("cat", "linear"), "soups: sum of products, or of B's alone"),
    "stage": Parameter(_whole(1, 1 << 16), "a whole number from 1", "dps: stages that count"),
    "include": Parameter(_indices, "a list of layer indices", "layers that stay"),
    "exclude": Parameter(_indices, "a list of layer indices", "layers that go"),
    "indices": Parameter(_indices, "a list of ranks", "ranks that stay, by number"),
    "top": Parameter(_whole(1, 1 << 16), "a whole number from 1", "ranks that stay, by length"),
    "layers": Parameter(_whole(1, 1 << 20), "a whole number from 1", "layers of the model, for"
                        " gradients; the largest index found + 1 when left out"),
}  # fmt: skip


def check_parameters(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    where: str,
    only: Mapping[str, Sequence[str]] | None = None,
    brings: Mapping[str, Parameter] | None = None,
) -> dict[str, Any]:
    """All parameters of a merge, defaults filled in.

    Args:
        given: what the user said; a null value counts as not said.
        defaults: the allowed names with their defaults.
        only: parameters with fewer choices here than in the table.
        brings: parameters that the table does not have.
        where: whose parameters they are, for messages.
    Raises:
        AdapterError: `unknown_key`, `bad_value`.
    """
    found, said = dict(defaults), set()
    for name, value in given.items():
        key = ALIASES.get(name, name)
        if key not in defaults:
            raise AdapterError(
                "unknown_key", f"{where} has no parameter '{name}'", seen=value,
                limit=sorted(defaults), fix=f"remove '{name}'",
            )  # fmt: skip
        if key in said:
            raise AdapterError(
                "bad_value", f"'{key}' of {where} is given twice", seen=name, fix="keep one",
            )  # fmt: skip
        said.add(key)
        if value is not None:
            found[key] = check_parameter(key, value, where, brings)
            if only and key in only and value not in only[key]:
                raise AdapterError(
                    "bad_value", f"{where} does not have this '{name}'", seen=value,
                    limit=list(only[key]), fix="choose one of them, or leave it out",
                )  # fmt: skip
    return found


def check_parameter(
    name: str, value: Any, where: str, brings: Mapping[str, Parameter] | None = None
) -> Any:
    """One value. Raises AdapterError `bad_value`."""
    parameter = (brings or {}).get(name) or PARAMETERS[name]
    checked = parameter.check(value)
    if checked is None:
        raise AdapterError(
            "bad_value", f"'{name}' of {where} is out of range", seen=value,
            limit=parameter.allowed, fix="mend the value",
        )  # fmt: skip
    return number(checked, name) if isinstance(checked, float) else checked
