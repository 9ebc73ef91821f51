"""What a variant's converter works with: the artefact, what was given beside it, what it found."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.variants.files import Artefact, Checkpoint
from vllm_lora_ext.merging.variants.lowrank import best_rank

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Converted:
    """An artefact as low-rank factors.

    The layer computes `bias + out_scale ⊙ (W (in_scale ⊙ x) + B A x)`; a multiplier that is not
    there is 1.

    Args:
        factors: fp32, scale folded into B.
        system: name of the format, a row of `adapters.FORMATS`.
        error: module → |approximation - delta| / |delta| (Frobenius); None when exact.
        notes: what a user should know about this conversion, a sentence each.
        out_scale: module → [out] fp32, or None. Only when multipliers were asked for.
        in_scale: module → [in] fp32, or None.
    """

    factors: Factors
    system: str
    error: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    out_scale: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    in_scale: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    @property
    def exact(self) -> bool:
        return self.error is None


@dataclass
class Conversion:
    """One conversion in progress; converters fill in the lower half.

    Args:
        folder: the artefact, its settings taken by `folder.setting`.
        base: the base model's checkpoint, or None.
        init: folder of the adapter that training began with, or None.
        index: file or folder that says which rows and columns a pruned model kept, or None.
        pruned: checkpoint of the pruned model, or None.
        rank: rank to approximate a full-rank delta with, or None.
        multipliers: the caller can apply out_scale and in_scale.
    """

    folder: Artefact
    base: Checkpoint | None = None
    init: Path | None = None
    index: Path | None = None
    pruned: Checkpoint | None = None
    rank: int | None = None
    multipliers: bool = False
    allow_pickle: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    out_scale: dict[str, torch.Tensor] = field(default_factory=dict)
    in_scale: dict[str, torch.Tensor] = field(default_factory=dict)

    def weight(self, module: str) -> torch.Tensor:
        """[out, in] fp32 of the base model. Raises AdapterError `missing_setting`, ..."""
        if self.base is None:
            raise AdapterError(
                "missing_setting", "this conversion needs the base model's weights",
                seen="no base", fix="give the folder of the base model",
            )  # fmt: skip
        return self.base.weight(module)

    def dense(self, module: str, delta_NK: torch.Tensor) -> Pair:
        """The best pair of the asked rank for a full-rank delta; its error is noted.

        Raises:
            AdapterError: `missing_setting`, no rank was given.
        """
        if not bool(delta_NK.isfinite().all()):
            raise AdapterError(
                "not_finite", f"the delta of {module} holds NaN or infinity",
                fix="check the artefact and the base weights",
            )  # fmt: skip
        if self.rank is None:
            raise AdapterError(
                "missing_setting", f"the delta of {module} has full rank", seen="no rank",
                limit=f"1 to {min(delta_NK.shape)}, where {min(delta_NK.shape)} is exact",
                fix="give the rank to approximate it with",
            )  # fmt: skip
        pair, self.errors[module] = best_rank(delta_NK, self.rank)
        return pair

    def setting(self, key: str, default: Any) -> Any:
        """A setting, or its default."""
        return self.folder.setting(key, key) if self.folder.has_setting(key) else default

    def forget(self, keys: Iterable[str]) -> None:
        """Accept settings without reading them."""
        for key in keys:
            self.setting(key, None)
