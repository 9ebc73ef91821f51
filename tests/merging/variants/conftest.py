"""A tiny Llama of odd sizes on disk, and no gradients."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True, scope="session")
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def make_base():
    """A fresh model each time, always with the same weights: PEFT wraps a model for good."""

    def make():
        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=48, intermediate_size=84, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, vocab_size=60, max_position_embeddings=64,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        for weight in model.parameters():
            weight.normal_(std=0.4)
        return model

    return make


@pytest.fixture(scope="session")
def base_dir(make_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder
