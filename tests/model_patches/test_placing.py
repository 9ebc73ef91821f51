"""Where an adapter's parts go in layers that vLLM has fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.make_adapters import normal, random_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import delta_reference

LAYER = "model.layers.0.mlp.gate_up_proj"
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def four_slices(harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A Llama whose `gate_up_proj` has four slices, for which adapters have two names, as Qwen3.5's
    `in_proj_qkvz` has: the first name stands for three."""
    from tests.model_patches.conftest import _start

    _start()
    import vllm.model_executor.models.llama as llama

    merged = llama.MergedColumnParallelLinear

    def build(*args: Any, output_sizes: list[int], **kwargs: Any) -> Any:
        half = output_sizes[0] // 2
        sizes = [half, half // 2, output_sizes[0] - half - half // 2, output_sizes[1]]
        return merged(*args, output_sizes=sizes, **kwargs)

    monkeypatch.setattr(llama, "MergedColumnParallelLinear", build)
    return harness


def test_fewer_names_than_slices(four_slices: Callable[..., Any]) -> None:
    """Plain and routed, both names, the first only, and the second only; as stock has it."""
    h = four_slices(max_loras=1, max_cpu_loras=1)
    config, x = h.config.model_config.hf_config, normal(np.random.default_rng(0), 5, 128)
    layer = h.manager.modules[LAYER]
    assert layer.n_slices == 4 and h.manager.packed_modules[LAYER] == [GATE, UP]
    for targets in (("gate_proj", "up_proj"), ("gate_proj",), ("up_proj",)):
        for kind in ("plain", "routed"):
            options = {} if kind == "routed" else {"plain": True}
            adapter = made(config, targets, **options)
            request = h.save("-".join((kind, *targets)), adapter)
            h.worker.load(request, None, ())
            want = torch.zeros(5, sum(layer.output_slices))
            half = want.shape[1] // 2
            for name, columns in ((GATE, slice(0, half)), (UP, slice(half, None))):
                if name in adapter.modules:
                    want[:, columns] = delta_reference(adapter.modules[name], x)
            torch.testing.assert_close(h.delta(LAYER, request, x), want, rtol=1e-4, atol=1e-4)
            if kind == "plain":
                same_as_stock(layer, adapter, want, x)
            h.worker.remove_adapter(request.lora_int_id)


def made(config: Any, targets: tuple[str, ...], plain: bool = False) -> RoutedAdapter:
    adapter = random_adapter(config, 3, targets=targets)
    if not plain:
        return adapter
    modules = {n: RoutedModule(m.a_RK, m.b_NR) for n, m in adapter.modules.items()}
    return RoutedAdapter(modules, system="plain")


def same_as_stock(layer: Any, adapter: RoutedAdapter, want: torch.Tensor, x: torch.Tensor) -> None:
    """Stock spreads the two pairs over the slices in the same way."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA

    pairs = [adapter.modules.get(name) for name in (GATE, UP)]
    if pairs[0] is None:
        return  # stock takes the slices behind a missing part for this part's own
    a, b = MergedColumnParallelLinearWithLoRA.expand_packed_lora(
        layer, [m and m.a_RK for m in pairs], [m and m.b_NR for m in pairs]
    )
    parts = zip(a, b, layer.output_slices, strict=True)
    stock = [x.new_zeros(5, n) if a is None else x @ a.T @ b.T for a, b, n in parts]
    torch.testing.assert_close(torch.cat(stock, 1), want, rtol=1e-4, atol=1e-4)


def test_a_part_of_another_size_is_refused(four_slices: Callable[..., Any]) -> None:
    h = four_slices()
    adapter = made(h.config.model_config.hf_config, ("gate_proj", "up_proj"))
    cut = dataclasses.replace(adapter.modules[GATE], b_NR=adapter.modules[GATE].b_NR[1:])
    swapped = adapter.modules | {GATE: cut}
    with pytest.raises(AdapterError) as caught:
        h.worker.load(h.save("odd", RoutedAdapter(swapped, system="random")), None, ())
    assert caught.value.code == "shape_mismatch"
