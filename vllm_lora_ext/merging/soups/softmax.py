"""Learned weights of LoRA Soups: one scalar per module and adapter, softmax over the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_lora_ext.errors import AdapterError


def softmax_weights(scalars: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Weights per adapter and module from the learned scalars.

    p = softmax over the adapters that have the module, as in LoRA-Soups' layer
    (https://arxiv.org/abs/2410.13025, https://github.com/aksh555/LoRA-Soups).

    Args:
        scalars: per adapter, module → scalar.
    """
    found: list[dict[str, float]] = [{} for _ in scalars]
    for module in sorted({name for table in scalars for name in table}):
        having = [i for i, table in enumerate(scalars) if module in table]
        logits = torch.tensor([scalars[i][module] for i in having], dtype=torch.float64)
        if not bool(torch.isfinite(logits).all()):
            raise AdapterError(
                "not_finite", f"a learned weight of {module} is NaN or infinite",
                seen=logits.tolist(), fix="train the weights again",
            )  # fmt: skip
        for i, p in zip(having, torch.softmax(logits, dim=0).tolist(), strict=True):
            found[i][module] = p
    return found
