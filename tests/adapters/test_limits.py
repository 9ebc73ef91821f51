"""Facts that stand once, held against those who have them from elsewhere."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from vllm_lora_ext.adapters.limits import DTYPES, RANKS, slot_rank
from vllm_lora_ext.cli.output import Dtype
from vllm_lora_ext.merging.recipes.schema import Output


def test_ranks_are_those_that_vllm_takes() -> None:
    """Read from vLLM's source: importing it takes half a minute."""
    root = importlib.util.find_spec("vllm").submodule_search_locations[0]  # type: ignore[union-attr, index]
    for node in ast.parse((Path(root) / "config" / "lora.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "MaxLoRARanks":  # type: ignore[attr-defined]
            assert ast.literal_eval(node.value.slice) == RANKS  # type: ignore[attr-defined]
            return
    raise AssertionError("vLLM has no MaxLoRARanks")


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (256, 256), (257, 320), (513, None)])
def test_the_slot_for_a_rank(rank: int, slot: int | None) -> None:
    assert slot_rank(rank) == slot


def test_commands_and_recipes_know_the_same_dtypes() -> None:
    assert {dtype.value for dtype in Dtype} == set(DTYPES)
    literal, _none = get_args(Output.model_fields["dtype"].annotation)
    assert set(get_args(literal)) == set(DTYPES)
