"""Facts that several rooms need: vLLM's ranks, dtypes of weights, the largest bank of experts."""

from __future__ import annotations

import torch

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank accepts
# What adapters are written in and served in, by the names that settings and commands use.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# More than any adapter has; a config that says more is refused before anything is allocated.
MAX_EXPERTS = 4096


def slot_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` that holds `rank`; None: there is none."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)
