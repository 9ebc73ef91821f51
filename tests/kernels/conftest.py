"""A checkout is enough to test the kernels: a bare GPU machine has not installed the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import vllm_lora_ext

if find_spec("vllm_lora_ext.kernels") is None:
    vllm_lora_ext.__path__.append(str(Path(__file__).parents[2]))  # kernels/ and routing/


def _poisoned(allocate):
    def empty(*args, **kwargs):
        new = allocate(*args, **kwargs)
        if new.is_floating_point() and not new.is_meta:
            new.detach().fill_(float("nan"))
        return new

    return empty


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated and not written is NaN: whoever reads it shows."""
    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
