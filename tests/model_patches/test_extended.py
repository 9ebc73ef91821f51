"""The settings `extend_weights` and `fuse_activation`: which layers have A and routers below their
weight or activate, what they then run, and who is refused. The kernels are doubles;
`tests/kernels/test_extension.py` and `test_glu.py` have their numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.make_adapters import normal, random_module, router_spec
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

pytest.importorskip("triton")
QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"


class Launch:
    """In place of the kernel: base rows as they are, and what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[torch.Tensor, torch.Tensor | None, Any]] = []

    def __call__(self, y_TN: torch.Tensor, e_TE: torch.Tensor, bias: Any, site: Any) -> None:
        self.given.append((e_TE, bias, site))
        y_TN.copy_(e_TE[:, : y_TN.shape[1]])


@pytest.fixture
def launch(monkeypatch) -> Launch:
    from vllm_lora_ext.kernels.gated_lora.backends.triton import extended

    made = Launch()
    monkeypatch.setattr(extended, "expand_extended", made)
    return made


@pytest.fixture
def extended(harness, launch, monkeypatch):
    """Harnesses with the setting, on layers of which any number of rows is few."""
    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches import config, manager

    monkeypatch.setattr(config, "check_kernels", lambda *_: None)
    monkeypatch.setattr(manager, "choose_backend", lambda *_: choice.triton())
    monkeypatch.setattr(manager.RoutedLoRAModelManager, "_warm", lambda *_: None)

    def make(share: float = 1e6, **options: Any) -> Any:
        return harness({"extend_weights": share}, **options)

    make.make = harness  # type: ignore[attr-defined]
    return make


def linears(made: Any) -> dict[str, Any]:
    return {name: m for name, m in made.manager.modules.items() if hasattr(m, "has_product")}


def test_every_layer_takes_its_base_weight_in(extended) -> None:
    made = extended()
    assert {QKV, GATE_UP} <= set(linears(made))
    for layer in linears(made).values():
        own, weight = layer.site.extension, layer.base_layer.weight
        assert weight.data_ptr() == own.weight_EK.data_ptr()
        assert torch.equal(weight, torch.full_like(weight, 0.02))  # the harness's
    assert not made.manager.blocks  # their kernels want shrinks that nobody makes


def test_a_layer_whose_slots_are_many_stays_as_it_is(extended) -> None:
    made = extended(share=0.1)
    assert all(layer.site.extension is None for layer in linears(made).values())
    assert made.manager.blocks


def test_without_the_setting_nothing_is_extended(extended, harness) -> None:
    made = harness()
    assert all(layer.site.extension is None for layer in linears(made).values())


@pytest.mark.parametrize(
    "reason", ["quantised", "other dtype", "a sum over ranks", "batch-invariant"]
)
def test_layers_that_cannot(reason, extended, monkeypatch) -> None:
    from vllm_lora_ext.model_patches import layers
    from vllm_lora_ext.model_patches.backend import Building, build_with

    made = extended()
    layer = linears(made)[QKV]
    with build_with(Building(8, layer.site.backend, graphs=False, extend=1e6)):
        assert layer._extended(2, layer.lora_config) is not None
        if reason == "quantised":
            layer.base_layer.quant_method = type("Fp8", (), {})()
        elif reason == "other dtype":
            layer.base_layer.weight.data = layer.base_layer.weight.data.half()
        elif reason == "batch-invariant":
            monkeypatch.setattr(layers.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
        else:
            layer.reduces = True
        assert layer._extended(2, layer.lora_config) is None


def test_a_step_with_adapters_is_one_product_and_one_launch(extended, launch) -> None:
    made = extended()
    request = made.random("a")
    made.worker.add_adapter(request)
    made.step(request, None, request)
    layer = linears(made)[QKV]
    site, n = layer.site, sum(layer.output_slices)
    x_TK = normal(np.random.default_rng(1), 3, layer.input_size)
    y_TN = layer._apply_sync(x_TK, None)
    ((e_TE, bias, used),) = launch.given
    assert used is site and bias is None and y_TN.shape == (3, n)
    torch.testing.assert_close(y_TN, x_TK @ layer.base_layer.weight.t())
    slot = made.slot_of(request)
    plan, first = site.plans[slot], n + slot * site.extension.slot_rows
    stacked = [(plan.a_RK, first), (plan.router_GK, first + site.extension.ranks)]
    for rows_RK, at in stacked:
        torch.testing.assert_close(e_TE[:, at : at + len(rows_RK)], x_TK @ rows_RK.t())


def test_a_step_of_the_base_model_is_the_base_layers_own_product(extended, launch) -> None:
    made = extended()
    made.step(None, None)
    layer = linears(made)[QKV]
    x_TK = normal(np.random.default_rng(1), 2, layer.input_size)
    want_TN = torch.nn.functional.linear(x_TK, layer.base_layer.weight)
    assert torch.equal(layer._apply_sync(x_TK, None), want_TN) and not launch.given


def test_weights_that_come_later_are_taken_in(extended) -> None:
    made = extended()
    layer = linears(made)[QKV]
    address = layer.base_layer.weight.data_ptr()
    layer.base_layer.weight.data = torch.ones_like(layer.base_layer.weight)
    made.manager.follow_base()
    assert layer.base_layer.weight.data_ptr() == address
    assert layer.site.extension.base_NK.eq(1).all()


def test_a_router_that_reads_a_normalised_input_is_refused(extended) -> None:
    from vllm_lora_ext.model_patches.placing import _check_extended

    made = extended()
    rng, layer = np.random.default_rng(0), linears(made)[GATE_UP]
    width, (size, _) = layer.input_size, layer.output_slices
    gate = replace(router_spec(), normalise="layer", product=True)
    for module in (random_module(rng, width, size, GateSpec()), None):
        _check_extended(GATE_UP, layer, [module])
    with pytest.raises(AdapterError, match="extend_weights") as caught:
        _check_extended(GATE_UP, layer, [None, random_module(rng, width, size, gate)])
    assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize(
    ("share", "seen"), [(0.1, "cpu"), ("yes", "yes"), (-0.1, "-0.1"), (True, "true")]
)
def test_the_setting_is_refused_where_no_kernel_reads_it_or_it_is_no_share(
    share, seen, harness
) -> None:
    with pytest.raises(AdapterError, match="extend_weights") as caught:
        harness({"extend_weights": share})
    assert caught.value.code == "bad_settings" and f"seen: {seen}" in str(caught.value)


def test_the_other_setting_too(harness) -> None:
    with pytest.raises(AdapterError, match="fuse_activation"):
        harness({"fuse_activation": True})


# --- an expand that activates ---------------------------------------------------------------------


@pytest.fixture
def fused(extended, monkeypatch):
    """Harnesses with the setting, and what their kernel was given."""
    from torch.nn.functional import silu

    from vllm_lora_ext.kernels.gated_lora.backends.triton import backend, glu

    given: list[Any] = []

    def double(a_TI: Any, y_TN: Any, u_PTR: Any, site: Any, bias_N: Any = None) -> None:
        given.append(u_PTR)
        a_TI.copy_(silu(y_TN[:, : a_TI.shape[1]]) * y_TN[:, a_TI.shape[1] : 2 * a_TI.shape[1]])

    monkeypatch.setattr(glu, "glu", double)
    monkeypatch.setattr(backend, "shrink", lambda x, site, memory=None: x)
    return lambda **settings: (
        extended.make({"fuse_activation": True, **settings}),
        given,
    )


def test_gate_and_up_activate_and_the_models_activation_does_nothing(fused) -> None:
    from vllm_lora_ext.model_patches.mlp import Activated

    made, given = fused()
    layer, mlp = linears(made)[GATE_UP], made.model.get_submodule("model.layers.0.mlp")
    assert isinstance(mlp.act_fn, Activated) and not made.manager.blocks
    assert layer.site.activation == "silu"
    request = made.random("a")
    made.worker.add_adapter(request)
    x_TK = normal(np.random.default_rng(1), 3, layer.input_size)
    layer.base_layer.cpu_linear = torch.nn.functional.linear  # what vLLM's loader makes
    for rows, launches in (((request, None, request), 2), ((None, None, None), 1)):
        made.step(*rows)
        y_TN = torch.nn.functional.linear(x_TK, layer.base_layer.weight)
        gate_TI, up_TI = y_TN.chunk(2, dim=1)
        got_TI = mlp.act_fn(layer(x_TK)[0])
        torch.testing.assert_close(got_TI, torch.nn.functional.silu(gate_TI) * up_TI)
        assert (given.pop() is not None) == (launches == 2)


def test_both_settings_go_together(fused) -> None:
    made, given = fused(extend_weights=1e6)
    layer = linears(made)[GATE_UP]
    assert layer.site.extension is not None and layer.site.activation == "silu"
    request = made.random("a")
    made.worker.add_adapter(request)
    made.step(request)
    x_TK = normal(np.random.default_rng(1), 1, layer.input_size)
    assert layer._apply_sync(x_TK, None).shape == (1, layer.output_slices[0])
    assert given == [None]  # no shrink


def test_activations_that_the_kernels_do_not_know_stay_the_models(fused, monkeypatch) -> None:
    from vllm_lora_ext.model_patches import mlp

    monkeypatch.setattr(mlp, "_act_name", lambda _: None)
    made, _ = fused()
    assert linears(made)[GATE_UP].site.activation is None and made.manager.blocks


def test_experts_that_are_blocks_are_refused(fused) -> None:
    made, _ = fused()
    with pytest.raises(AdapterError, match="fuse_activation") as caught:
        made.manager.placer._block("mlp", "model.layers.0.mlp", None)
    assert caught.value.code == "unsupported_feature"
