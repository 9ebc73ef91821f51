"""Which backend runs, and whether CUDA graphs may: every combination, without a GPU."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.make_adapters import random_module, router_spec
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.backends import choice, eager
from vllm_lora_ext.model_patches.backend import check_graphs, choose_backend

WRONG = "results differ by 2.0e-01 of their norm"


def _never() -> str | None:
    raise AssertionError("the check must not run")


@pytest.mark.parametrize("device", ["cpu", "xpu"])
@pytest.mark.parametrize("wanted", [None, False])
def test_no_gpu_takes_pytorch_without_a_check(device: str, wanted: bool | None) -> None:
    assert choose_backend(wanted, device, _never) is choice.without_triton(device)


def test_false_takes_pytorch_on_a_gpu_too() -> None:
    assert choose_backend(False, "cuda", _never) is eager


@pytest.mark.parametrize("wanted", [None, True])
def test_a_gpu_takes_the_kernels_when_their_check_passes(
    wanted: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_backend(wanted, "cuda", lambda: None) is choice.triton()
    assert not caplog.records


def test_a_failed_check_is_one_warning_and_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True  # vLLM turns it off once it is imported
    with caplog.at_level(logging.WARNING, "vllm.lora_ext"):
        assert choose_backend(None, "cuda", lambda: WRONG) is eager
    (record,) = set(caplog.records)  # after an engine in this process, pytest hears it twice
    assert WRONG in record.getMessage() and "PyTorch" in record.getMessage()


@pytest.mark.parametrize(("device", "seen"), [("cuda", WRONG), ("cpu", "cpu"), ("xpu", "xpu")])
def test_true_refuses_to_start_where_the_kernels_cannot_run(device: str, seen: str) -> None:
    with pytest.raises(AdapterError) as caught:
        choose_backend(True, device, lambda: WRONG)
    assert caught.value.code == "bad_settings"
    assert f"seen: {seen}" in caught.value.text and "triton" in caught.value.text


GRAPHS = (None, "NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


@pytest.mark.parametrize(
    ("graphs", "device", "kernels"),
    list(itertools.product(GRAPHS, ("cpu", "cuda", "xpu"), (False, True))),
)
def test_graphs_need_kernels(graphs: str | None, device: str, kernels: bool) -> None:
    captures = device != "cpu" and graphs not in (None, "NONE")
    if captures and not kernels:
        with pytest.raises(AdapterError, match="--enforce-eager") as caught:
            check_graphs(graphs, device, kernels)
        assert caught.value.code == "bad_settings"
        assert f"cudagraph_mode {graphs}" in caught.value.text
    else:
        assert check_graphs(graphs, device, kernels) is captures


def test_engines_with_graphs_refuse_experts_that_pytorch_would_serve() -> None:
    from vllm_lora_ext.model_patches.placing import Placer

    name = "model.layers.0.mlp"
    for graphs, kernel in itertools.product((False, True), repeat=2):
        block = SimpleNamespace(on_kernel=lambda experts, kernel=kernel: kernel)
        placer = SimpleNamespace(_blocks={name: block}, _graphs=graphs)
        if not graphs or kernel:
            assert Placer._block(placer, "layers.0.mlp", name, None) is block
            continue
        with pytest.raises(AdapterError, match="--enforce-eager") as caught:
            Placer._block(placer, "layers.0.mlp", name, None)
        assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize("shape", [(5, 16), (1, 5, 16)])
def test_the_shrink_beside_the_base_product_adds_the_same(
    shape: tuple[int, ...],
) -> None:
    from vllm_lora_ext.kernels.gated_lora import Site, StepMap, gated_lora_reference
    from vllm_lora_ext.model_patches import layers

    rng = np.random.default_rng(0)
    site = Site(2, 16, (12,), 8, 8, torch.float32, "cpu")
    module = random_module(rng, 16, 12, router_spec())
    site.write(1, [module])
    site.step = StepMap(8)
    slots_T = np.array([1, -1, 0, 1, 1])
    site.step.update(slots_T)
    weight_NK, x = torch.randn(12, 16), torch.randn(shape)
    base = SimpleNamespace(apply=lambda _layer, x, bias: x @ weight_NK.t())
    layer = SimpleNamespace(
        site=site, memory=None, base_layer=None,
        _get_quant_method=lambda: base, _events=(None, None), _lora_stream=None,
    )  # fmt: skip
    got = layers.RoutedLinear._apply_async_impl(layer, x)
    delta_TN = gated_lora_reference(
        x.view(5, 16), torch.from_numpy(slots_T), [[None], [module]], (12,)
    )
    torch.testing.assert_close(got, x @ weight_NK.t() + delta_TN.view(got.shape))
