"""Weights that the slots' dtype cannot hold are refused where a worker reads an adapter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_adapters import random_module
from vllm.lora.request import LoRARequest

from vllm_lora_ext.adapters import RoutedAdapter, write_native
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.manager import RoutedLoRAModelManager
from vllm_lora_ext.model_patches.worker import RoutedWorkerLoRAManager
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.settings import LoraExtSettings

NAME = "model.layers.0.mlp.up_proj"


def worker(dtype: torch.dtype) -> RoutedWorkerLoRAManager:
    """A worker's manager over a model of one layer, without an engine."""
    manager = object.__new__(RoutedLoRAModelManager)
    manager.__dict__ |= {
        "model": torch.nn.Module(), "modules": {}, "packed_modules": {}, "blocks": {},
        "lora_config": SimpleNamespace(max_lora_rank=8, lora_dtype=dtype), "router_rows": 8,
        "base_name": "", "_shapes": lambda: {NAME: (16, 12)},
    }  # fmt: skip
    made = object.__new__(RoutedWorkerLoRAManager)
    made.__dict__ |= {
        "settings": LoraExtSettings(), "_adapter_manager": manager, "_in_step": False,
        "_evicted": SimpleNamespace(put=lambda request, model: None),
    }  # fmt: skip
    return made


@pytest.mark.parametrize("part", ["a_RK", "b_NR"])
def test_overflow_is_refused(part, tmp_path):
    """|B| = 3e6: finite in the file and in bfloat16, infinite in float16."""
    module = random_module(np.random.default_rng(0), 16, 12, GateSpec(), rank=4)
    tensor = getattr(module, part).clone()
    tensor[1, 2] = -3e6
    adapter = RoutedAdapter({NAME: dataclasses.replace(module, **{part: tensor})}, system="plain")
    request = LoRARequest("large", 1, str(write_native(adapter, tmp_path / "a")))
    with pytest.raises(AdapterError, match="float16") as caught:
        worker(torch.float16)._load_adapter(request)
    assert caught.value.code == "overflow"
    for dtype in (torch.bfloat16, torch.float32):
        assert worker(dtype)._load_adapter(request).adapter.rank == 4
