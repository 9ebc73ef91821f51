"""Linears whose weight vLLM has packed away."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers import base_linear


@pytest.mark.parametrize("weight", [None, torch.nn.Parameter(torch.ones(2, 2))])
def test_where_a_layer_lies(weight: torch.nn.Parameter | None) -> None:
    layer = torch.nn.Module()
    layer.register_parameter("weight", weight)
    layer.register_parameter("weight_scale", torch.nn.Parameter(torch.ones(2)))
    assert base_linear._get_lora_device(layer) == torch.device("cpu")
