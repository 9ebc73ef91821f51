"""write_recipe(): a recipe in, an ordinary PEFT folder out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.merging.factors import save_peft
from vllm_lora_ext.merging.merge import Progress
from vllm_lora_ext.merging.recipes.lock import (
    LOCK,
    Inputs,
    check_unchanged,
    check_versions,
    lock_file,
    read_inputs,
)
from vllm_lora_ext.merging.recipes.run import Locate, run_recipe
from vllm_lora_ext.merging.recipes.schema import Recipe
from vllm_lora_ext.merging.recipes.watch import Cancel


@dataclass(frozen=True)
class Built:
    """A merged adapter on disk.

    Args:
        path: its folder.
        rank: its largest.
        report: `Report.to_dict()` of the merge.
    """

    path: Path
    rank: int
    report: dict[str, Any]


def write_recipe(
    recipe: Recipe,
    locate: Locate,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    inputs: Inputs | None = None,
) -> Built:
    """Merge as a recipe says and write the folder, whole or not at all.

    Args:
        locate, max_rank, progress, cancel: as in `run_recipe`.
        out: must be missing or empty.
        dtype: of the files, in place of the recipe's.
        inputs: looked at already.
    Raises:
        AdapterError: those of `run_recipe`, `save_peft`, `read_inputs` and `check_versions`.
    """
    of_files = dtype or getattr(torch, recipe.file_dtype)
    inputs = inputs or read_inputs(recipe, locate)
    check_versions(inputs, locate)
    merged = run_recipe(recipe, locate, max_rank=max_rank, progress=progress, cancel=cancel)
    check_unchanged(inputs, recipe, locate)
    report, rank = merged.report.to_dict(), merged.factors.rank
    name = str(of_files).removeprefix("torch.")
    lock = lock_file(recipe, inputs, name, max_rank, rank, report)
    folder = save_peft(merged.factors, out, of_files, extra_files={LOCK: lock})
    return Built(folder, rank, report)
