"""Weights that the slots' dtype cannot hold are refused where a worker loads an adapter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from make_adapters import random_module

from vllm_lora_ext.adapters import RoutedAdapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

NAME = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("part", ["a_RK", "b_NR"])
def test_overflow_is_refused(part, harness):
    """|B| = 3e6: finite in the file and in bfloat16, infinite in float16."""
    for dtype, fits in (("float16", False), ("bfloat16", True)):
        made = harness(dtype=dtype)
        out, width = made.model.get_submodule(NAME).base_layer.weight.shape
        module = random_module(np.random.default_rng(0), width, out, GateSpec(), rank=4)
        tensor = getattr(module, part).clone()
        tensor[1, 2] = -3e6
        module = dataclasses.replace(module, **{part: tensor})
        request = made.save("large", RoutedAdapter({NAME: module}, system="plain"))
        if fits:
            assert made.worker.load(request, None, ()).bytes
            continue
        with pytest.raises(AdapterError, match="float16") as caught:
            made.worker.load(request, None, ())
        assert caught.value.code == "overflow"
        assert not made.worker.list_adapters()
