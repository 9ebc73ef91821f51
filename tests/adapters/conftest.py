"""The tiny base models, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from make_adapters import FIXTURES
from transformers import AutoModelForCausalLM


def load_base(name: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "bases" / name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def bases():
    return {name: load_base(name) for name in ("base_llama", "base_qwen2")}


@pytest.fixture(autouse=True, scope="session")
def _no_gradients():
    with torch.no_grad():
        yield
