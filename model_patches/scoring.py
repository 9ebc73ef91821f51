"""Engines for embeddings start without a tokenizer too.

Target: what decides whether an engine offers vLLM's scores of pairs of texts. Where a tokenizer is
not wanted (`skip_tokenizer_init`), stock makes their part all the same, which asks for one.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.entrypoints.pooling import factories


def apply() -> None:
    """Wraps the decision: no tokenizer, no pairs of texts."""
    stock = factories.enable_scoring_api

    @functools.wraps(stock)
    def new_enable_scoring_api(supported_tasks: Any, model_config: Any = None) -> bool:
        if getattr(model_config, "skip_tokenizer_init", False):
            return False
        return stock(supported_tasks, model_config)

    factories.enable_scoring_api = new_enable_scoring_api
