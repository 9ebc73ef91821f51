"""An adapter's names of layers, in models with several parts."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lora_ext.model_patches import names
from vllm_lora_ext.model_patches.names import Names

LAYER = "layers.0.mlp.up_proj"


def made(
    monkeypatch: pytest.MonkeyPatch, known: Collection[str], *parts: str, pooling: bool = False
) -> Names:
    monkeypatch.setattr(names, "supports_multimodal", lambda model: bool(parts))
    mapping = SimpleNamespace(language_model=list(parts))
    model: Any = SimpleNamespace(get_mm_mapping=lambda: mapping)
    return Names(model, set(known).__contains__, pooling)


@pytest.mark.parametrize("part", ["language_model", "language_model."])
def test_a_language_models_own_names(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    here = f"language_model.model.{LAYER}"
    found = made(monkeypatch, [here, "language_model.lm_head"], part)
    assert found.layer(f"model.{LAYER}") == found.layer(here) == here
    assert found.layer("lm_head") == "language_model.lm_head"
    assert found.parameter(f"model.{LAYER}.weight") == f"{here}.weight"
    assert found.layer("model.layers.9.mlp.up_proj") == "model.layers.9.mlp.up_proj"


def test_a_part_that_others_call_model(monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"model.text_model.{LAYER}"
    assert made(monkeypatch, [here], "model.text_model").layer(f"model.{LAYER}") == here


def test_what_the_model_calls_so_itself_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    both = f"model.{LAYER}", f"language_model.model.{LAYER}"
    assert made(monkeypatch, both, "language_model").layer(both[0]) == both[0]


def test_two_parts_could_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = "thinker", "talker"
    own = f"model.{LAYER}"
    known = [f"{part}.{own}" for part in parts]
    assert made(monkeypatch, known, *parts).layer(own) == own
    assert made(monkeypatch, known[1:], *parts).layer(own) == known[1]


def test_spellings_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "language_model.model.layers.0.block_sparse_moe.gate"
    found = made(monkeypatch, [here], "language_model", pooling=True)
    assert found.layer("layers.0.mlp.gate") == found.layer("model.layers.0.mlp.gate") == here
    assert made(monkeypatch, [here], "language_model").layer("layers.0.mlp.gate") != here
