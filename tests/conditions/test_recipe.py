from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vllm_lora_ext.conditions import DERIVED_IDS, PREFIX, Part, Recipe, is_recipe
from vllm_lora_ext.errors import AdapterError

RED = Part("red", 3, "/adapters/red", "aa" * 32)
GREEN = Part("green", 4, "/adapters/green", "bb" * 32, scale=-0.5)
RECIPES = [
    Recipe((RED,), by_row=True),
    Recipe((RED, GREEN)),
    Recipe((RED,), user=(0.5, -1.0)),
    Recipe((RED,), gate="AACAPw=="),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_its_path(recipe: Recipe) -> None:
    path = recipe.path()
    assert is_recipe(path) and Recipe.parse(path) == recipe
    assert Recipe.parse(path).version == recipe.version


def test_only_what_weights_depend_on_makes_another_version() -> None:
    assert len({recipe.version for recipe in RECIPES}) == len(RECIPES)
    moved = replace(RED, lora_id=9, path="/elsewhere", name="rouge")
    assert Recipe((moved,), by_row=True).version == RECIPES[0].version
    newer = replace(RED, version="cc" * 32)
    assert Recipe((newer,), by_row=True).version != RECIPES[0].version


def test_ids_are_in_their_range_and_another_attempt_is_another_id() -> None:
    for recipe in RECIPES:
        ids = {recipe.lora_id(attempt) for attempt in range(4)}
        assert len(ids) == 4 and all(DERIVED_IDS <= i < 1 << 31 for i in ids)


PART = {"name": "red", "lora_id": 3, "path": "/a", "version": "aa"}


@pytest.mark.parametrize("fields", [
    "no json", [], {}, {"parts": []}, {"parts": [{**PART, "lora_id": "3"}]},
    {"parts": [{**PART, "scale": "1"}]}, {"parts": [{**PART, "more": 1}]}, {"parts": ["red"]},
    {"parts": [PART], "by_row": 1}, {"parts": [PART], "user": [True]},
    {"parts": [PART], "instruction": [1]}, {"parts": [PART], "gate": 3},
    {"parts": [PART], "more": 1},
])  # fmt: skip
def test_what_is_no_recipe_is_refused(fields: object) -> None:
    text = fields if isinstance(fields, str) else json.dumps(fields)
    with pytest.raises(AdapterError) as caught:
        Recipe.parse(PREFIX + text)
    assert caught.value.code == "bad_value"
