"""Merge methods that an installed package brings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, merge, save_peft
from vllm_lora_ext.merging.methods import ENTRY_POINTS
from vllm_lora_ext.merging.recipes import Store, parse_recipe
from vllm_lora_ext.serving.mix_name import is_mix_name, parse

GOOD = '''
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.methods import Method
from vllm_lora_ext.merging.parameters import Parameter
from vllm_lora_ext.merging.plans import Plan
from vllm_lora_ext.merging.work import Result

def loudest(settings, terms):
    """The adapter of the largest norm, times a gain."""
    def run(work):
        pair = max((p.pair for p in work.parts), key=lambda pair: float(pair.delta().norm()))
        return Result(Pair(pair.a_RK, pair.b_NR * settings["gain"]))
    return Plan(run)

METHOD = Method(
    "loudest", "the adapter of the largest norm", "https://example.org", False, "one is kept",
    loudest, {"rank": None, "energy": None, "lambda": 1.0, "layers": None, "gain": 1.0},
    brings={"gain": Parameter(lambda v: float(v) if v > 0 else None, "above 0", "a factor")},
)
'''
NAME = "model.layers.0.mlp.up_proj"


def _factors(seed: int, size: float) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 32, generator=draw), torch.randn(24, 4, generator=draw)
    return Factors({NAME: Pair(a, size * b)})


def test_it_merges_like_any_other(installed: Callable[..., None], tmp_path: Path) -> None:
    installed("loud_package", GOOD, ENTRY_POINTS)
    quiet, loud = _factors(0, 1.0), _factors(1, 5.0)
    merged = merge("loudest", [Term(quiet), Term(loud)], {"gain": 2})
    wanted = 2 * loud.modules[NAME].delta()
    assert torch.equal(merged.factors.modules[NAME].delta(), wanted)
    for name, factors in (("quiet", quiet), ("loud", loud)):
        save_peft(factors, tmp_path / name)
    recipe = parse_recipe({
        "version": 1, "merge_method": "loudest", "parameters": {"gain": 2},
        "models": [{"model": "quiet"}, {"model": "loud"}],
    })  # fmt: skip
    store = Store(tmp_path / "store", 1 << 30)
    built = store.get_or_build(recipe, lambda name: tmp_path / name)
    assert torch.allclose(load_factors(built.path).modules[NAME].delta(), wanted, atol=1e-5)
    assert store.get_or_build(recipe, lambda name: tmp_path / name).path == built.path
    installed("louder_package", GOOD.replace("brings=", "version=1, brings="), ENTRY_POINTS)
    shutil.rmtree(tmp_path / "loud_package-1.0.dist-info")
    assert store.get_or_build(recipe, lambda name: tmp_path / name).path != built.path


def test_requests_may_name_it(installed: Callable[..., None]) -> None:
    assert not is_mix_name("loudest:quiet")
    installed("loud_package", GOOD, ENTRY_POINTS)
    assert is_mix_name("loudest:quiet")
    assert str(parse("loudest[gain=2.5]:quiet+loud")) == "loudest[gain=2.5]:loud+quiet"
    with pytest.raises(AdapterError, match="'gain' of loudest is out of range") as error:
        parse("loudest[gain=0]:quiet+loud")
    assert error.value.code == "bad_value"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('no such device')", "no such device"),
        ("METHOD = 'cat'", "it is a str, not a Method"),
        (GOOD.replace('"loudest", "the', '"cat", "the'), "two methods have this name"),
    ],
)
def test_what_cannot_be_used_is_named(
    source: str, why: str, installed: Callable[..., None]
) -> None:
    installed("broken_package", source, ENTRY_POINTS)
    with pytest.raises(AdapterError, match=re.escape(why)) as error:
        merge("cat", [Term(_factors(0, 1.0))])
    assert error.value.code == "bad_method"
