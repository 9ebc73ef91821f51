"""Converters by the name of the format, a row of `adapters.FORMATS`.

Formats that are served and have no gate need none: their readers make an ordinary LoRA already.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_lora_ext.merging.factors import Factors
from vllm_lora_ext.merging.variants import (
    curriculum,
    lorafactory,
    pruned,
    rebase,
    scaled,
    seeded,
    spectral,
)
from vllm_lora_ext.merging.variants.conversion import Conversion

CONVERTERS: dict[str, Callable[[Conversion], Factors]] = {
    "c3a": spectral.c3a,
    "dora": scaled.dora,
    "fourierft": spectral.fourierft,
    "hira": scaled.hira,
    "hra": scaled.hra,
    "ia3": scaled.ia3,
    "llm_pruner": pruned.llm_pruner,
    "lorafactory": lorafactory.lorafactory,
    "loram": pruned.loram,
    "miss_bat": scaled.bat,
    "nola": seeded.nola,  # as its reader, with no limit of time
    "pvera": spectral.pvera,
    "randlora": spectral.randlora,
    "rebase": rebase.rebase,
    "scalezero": curriculum.curriculum,
}
