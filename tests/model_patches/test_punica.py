"""vLLM's wrapper for a GPU, on CPU tensors: nothing of stock's metadata where nothing reads it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.lora.punica_wrapper.punica_gpu as punica_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.kernels.gated_lora import EmbeddingSite, StepMap
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.op import embedding_lora_static_
from vllm_lora_ext.model_patches.backend import Building, build_with
from vllm_lora_ext.model_patches.punica import _with_step

WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "_unique2", "unique_consecutive", "sort"}


class Calls(TorchDispatchMode):
    """The names of the ops that run inside; `.item()` and `bool()` are `_local_scalar_dense`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)
    config = SimpleNamespace(max_loras=2, specialize_active_lora=False)
    made, device = _with_step(punica_gpu.PunicaWrapperGPU), torch.device("cpu")
    with build_with(Building(0, choice.without_triton("cpu"), False)):
        return made(64, 8, device, lora_config=config)


def update(wrapper: Any) -> set[str]:
    mapping = LoRAMapping((7, 7, 0, 5), (7, 0, 5), is_prefill=True)
    with Calls() as calls:
        wrapper.update_metadata(mapping, [5, 7], 3, 100)
    assert wrapper.step_map.token_slots_T[:5].tolist() == [1, 1, -1, 0, -1]
    return calls.names


def test_the_host_waits_for_nothing_that_nobody_reads(wrapper: Any) -> None:
    assert update(wrapper) & WAITS  # stock's way: what this test can see
    wrapper.stock_reads = False
    assert not update(wrapper) & WAITS


def test_a_model_of_linears_embedding_and_output_matrix(harness: Callable[..., Any]) -> None:
    made = harness()
    (wrapper,) = made.manager.punica_wrapper_mapping.values()
    assert not wrapper.stock_reads
    request = made.random("mine")
    made.worker.add_adapter(request)
    with Calls() as calls:
        made.step(request, None)
    assert not calls.names & WAITS
    assert wrapper.step_map.slots == {made.slot_of(request)}


def test_a_layer_of_stocks_has_its_metadata(harness: Callable[..., Any]) -> None:
    from vllm_lora_ext.model_patches.punica import skip_unread

    manager = harness().manager
    (wrapper,) = manager.punica_wrapper_mapping.values()
    other = SimpleNamespace(punica_wrapper=object())
    skip_unread([wrapper], [*manager.modules.values(), other])
    assert not wrapper.stock_reads
    skip_unread([wrapper], [*manager.modules.values(), SimpleNamespace(punica_wrapper=wrapper)])
    assert wrapper.stock_reads


def test_an_embedding_through_a_slot(harness: Callable[..., Any]) -> None:
    """Its B lies another way round than stock's; rows of the base, and of a slot without one."""
    made, draw = harness(), torch.Generator().manual_seed(0)
    a_RV, b_NR = torch.randn(4, 512, generator=draw), torch.randn(128, 4, generator=draw)
    adapter = RoutedAdapter(
        {"model.embed_tokens": RoutedModule(a_RV, b_NR, kind="embedding")}, "plain"
    )
    mine, other = made.save("mine", adapter), made.random("other")
    made.worker.add_adapter(mine)
    made.worker.add_adapter(other)
    layer, ids_T = made.manager.modules["model.embed_tokens"], torch.tensor([3, 500, 3, 7])
    layer.base_layer.weight.data.normal_(generator=draw)
    made.step(mine, other, None, mine)
    got = layer(ids_T) - layer.base_layer(ids_T)
    want = (b_NR @ a_RV[:, ids_T]).t() * torch.tensor([1, 0, 0, 1])[:, None]
    assert torch.allclose(got, want, atol=1e-4)
    assert layer.site.b_SNR.permute(1, 0, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_path_of_an_embedding(dtype: torch.dtype) -> None:
    """The same ops whatever the slots are, none of which waits; none without an adapter."""
    slots, width, out, rank = 3, 11, 5, 4
    draw = torch.Generator().manual_seed(1)
    a_SVR = torch.randn(slots, width, rank, generator=draw).to(dtype)
    b_SNR = torch.randn(slots, out, rank, generator=draw).to(dtype)
    site = EmbeddingSite(a_SVR, b_SNR, StepMap(16), {0, 2})
    ids_T, seen = torch.tensor([4, 10, 0, 4, 9]), set()
    for case in ([0, 2, -1, 2, 0], [1, 1, 1, 1, 1], [0, -1, -1, -1, -1]):
        site.step.update(np.array(case))
        y_TN = torch.zeros(5, out, dtype=dtype)
        with Calls() as calls:
            embedding_lora_static_(y_TN, ids_T, site)
        seen.add(frozenset(calls.names))
        for t, slot in enumerate(case):
            want = b_SNR[slot].float() @ a_SVR[slot, ids_T[t]].float() if slot >= 0 else 0 * y_TN[t]
            assert torch.allclose(y_TN[t].float(), want.float(), rtol=0.02, atol=0.05)
    assert len(seen) == 1 and not seen.pop() & WAITS
    site.step.update(np.array([-1] * 5))
    y_TN = torch.zeros(5, out, dtype=dtype)
    with Calls() as calls:
        embedding_lora_static_(y_TN, ids_T, site)
    assert not calls.names
