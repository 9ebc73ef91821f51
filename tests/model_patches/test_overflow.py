"""Weights that the slots' dtype cannot hold are refused where a worker reads an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.make_adapters import random_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec


@pytest.mark.parametrize("part", ["a_RK", "b_NR"])
def test_overflow_is_refused(part: str, harness: Callable[..., Any]) -> None:
    """|B| = 3e6: finite in the file and in bfloat16, infinite in float16."""
    h = harness(dtype="float16")
    adapter = random_adapter(h.config.model_config.hf_config, specs=GateSpec())
    name, module = next(iter(adapter.modules.items()))
    tensor = getattr(module, part).clone()
    tensor[1, 2] = -3e6
    large = dataclasses.replace(module, **{part: tensor})
    adapter = dataclasses.replace(adapter, modules={**adapter.modules, name: large})
    with pytest.raises(AdapterError, match="float16") as caught:
        h.worker.load(h.save("large", adapter), None, ())
    assert caught.value.code == "overflow" and name in caught.value.text
    for dtype in ("bfloat16", "float32"):
        h = harness(dtype=dtype)
        assert h.worker.load(h.save("large", adapter), None, ()).rank == 6
