"""Layers that the operator, the model's task or a drafter leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention import CrossAttention

from tests.make_adapters import FIXTURES, linear_shapes, normal, random_adapter, random_module
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.scope import Scope, on_encoder_rows
from vllm_lora_ext.routing import GateSpec, delta_reference

QKV, O_PROJ = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"


def adapter_for(h: Any, seed: int = 0, **kwargs: Any) -> RoutedAdapter:
    return random_adapter(h.config.model_config.hf_config, seed, **kwargs)


def inputs() -> torch.Tensor:
    return normal(np.random.default_rng(0), 5, 128)


def assert_adds(h: Any, layer: str, request: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(h.delta(layer, request, inputs()), want, rtol=1e-4, atol=1e-4)


def test_target_modules_narrow_an_adapter(harness: Callable[..., Any]) -> None:
    h = harness(lora_target_modules=["o_proj"])
    assert {name.rpartition(".")[2] for name in h.manager.modules} == {"o_proj"}
    adapter = adapter_for(h)
    request = h.save("all", adapter)
    h.worker.load(request, None, ())
    assert_adds(h, O_PROJ, request, delta_reference(adapter.modules[O_PROJ], inputs()))
    with pytest.raises(AdapterError, match="--lora-target-modules o_proj") as caught:
        h.worker.load(h.save("none", adapter_for(h, targets=("q_proj",))), None, ())
    assert caught.value.code == "empty_adapter"
    # Strict where it is no choice of the operator's.
    stray = RoutedAdapter(adapter.modules | {"model.layers.99.self_attn.o_proj":
                                             adapter.modules[O_PROJ]}, system="random")  # fmt: skip
    with pytest.raises(AdapterError) as caught:
        h.worker.load(h.save("stray", stray), None, ())
    assert caught.value.code == "unknown_module"


def test_target_modules_leave_no_block_of_experts_half(harness: Callable[..., Any]) -> None:
    h = harness(lora_target_modules=["down_proj"])
    folder = FIXTURES / "routed" / "mixlora-a" / "adapter"
    with pytest.raises(AdapterError, match="--lora-target-modules down_proj") as caught:
        h.worker.load(LoRARequest("mix", 1, str(folder)), None, ())
    assert caught.value.code == "unsupported_feature"


def test_a_fused_layer_of_which_one_part_is_a_target(harness: Callable[..., Any]) -> None:
    """As in stock: the layer is adapted, and so are all of its parts."""
    h = harness(lora_target_modules=["q_proj"])
    adapter = adapter_for(h)
    request = h.save("all", adapter)
    h.worker.load(request, None, ())
    parts = [adapter.modules[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"]
    want = torch.cat([delta_reference(p, inputs()) for p in parts], dim=1)
    assert_adds(h, QKV, request, want)


def test_a_pooling_model_takes_the_names_of_the_bare_model(harness: Callable[..., Any]) -> None:
    for pooling in (True, False):
        h = harness(**({"runner": "pooling", "convert": "embed"} if pooling else {}))
        adapter = adapter_for(h)
        bare = {name.removeprefix("model."): m for name, m in adapter.modules.items()}
        request = h.save("bare", RoutedAdapter(bare, system="random"))
        if pooling:
            h.worker.load(request, None, ())
            assert_adds(h, O_PROJ, request, delta_reference(adapter.modules[O_PROJ], inputs()))
            continue
        with pytest.raises(AdapterError) as caught:
            h.worker.load(request, None, ())
        assert caught.value.code == "unknown_module"


def test_layers_of_a_drafter_are_left_out(harness: Callable[..., Any]) -> None:
    h = harness()
    adapter = adapter_for(h)
    width, out = linear_shapes(h.config.model_config.hf_config)[O_PROJ]
    draft = random_module(np.random.default_rng(1), width, out, GateSpec(), rank=4)
    with_draft = dataclasses.replace(
        adapter, modules=adapter.modules | {"mtp.layers.0.self_attn.o_proj": draft}
    )
    request = h.save("drafted", with_draft)
    h.worker.load(request, None, ())
    assert_adds(h, O_PROJ, request, delta_reference(adapter.modules[O_PROJ], inputs()))


def test_layers_on_an_encoders_rows() -> None:
    """Left as they are, and refused by name: a step's map knows the decoder's rows only."""
    cross = torch.nn.Module.__new__(CrossAttention)
    torch.nn.Module.__init__(cross)
    attention = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("q_proj", "kv_proj")})
    attention["attn"] = cross
    model = torch.nn.ModuleDict({
        "encoder": torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 4)}),
        "decoder": torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 4), "cross": attention}),
    })  # fmt: skip
    assert on_encoder_rows(model["decoder"]["fc1"]) == ()
    model._tower_model_names = ["encoder"]
    scope = Scope(model, None, {"kv_proj": ["k_proj", "v_proj"]}, towers=False)
    plain = RoutedModule(torch.ones(2, 4), torch.ones(4, 2))

    def narrowed(*names: str) -> RoutedAdapter:
        adapter = RoutedAdapter(dict.fromkeys(names, plain), system="random")
        return scope.narrowed(adapter, {n: n for n in names}, names)

    assert list(narrowed("decoder.fc1", "decoder.cross.q_proj").modules)
    for name in ("encoder.fc1", "decoder.cross.k_proj", "decoder.cross.v_proj"):
        with pytest.raises(AdapterError, match=name) as caught:
            narrowed("decoder.fc1", name)
        assert caught.value.code == "unsupported_feature"
