"""VLLM_LORA_ENABLE_DUAL_STREAM, on and off: what is launched where, and who waits for whom."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
K, N, ROWS = 64, 48, 5


class Streams:
    """The order in which the host hands work to two streams."""

    def __init__(self) -> None:
        self.now = "main"
        self.work: list[tuple[str, str]] = []

    def put(self, what: str) -> None:
        self.work.append((self.now, what))

    @contextmanager
    def on(self, stream: Any) -> Any:
        before, self.now = self.now, stream
        yield
        self.now = before


class Event:
    def __init__(self, name: str, streams: Streams) -> None:
        self._name, self._streams = name, streams

    def record(self) -> None:
        self._streams.put(f"record {self._name}")

    def wait(self) -> None:
        self._streams.put(f"wait {self._name}")


class Kernel:
    def __init__(self, name: str, streams: Streams) -> None:
        self._name, self._streams = name, streams

    def __getitem__(self, _grid: Any) -> Any:
        return lambda *args, **kwargs: self._streams.put(self._name)


@pytest.fixture
def streams(monkeypatch) -> Streams:
    from vllm_lora_ext.kernels.gated_lora.backends.triton import expand, prefetch, shrink

    streams = Streams()
    monkeypatch.setattr(prefetch, "prefetch_kernel", Kernel("prefetch", streams))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.now)
    monkeypatch.setattr(shrink, "shrink_kernel", Kernel("shrink", streams))
    monkeypatch.setattr(expand, "expand_kernel", Kernel("expand", streams))
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    return streams


def layer(streams: Streams, slots_T: np.ndarray, side: str | None) -> Any:
    """What `RoutedLinear` reads of itself, its tensors without memory."""
    from vllm_lora_ext.kernels.gated_lora import Site, StepMap
    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches.layers import RoutedLinear

    site = Site(2, K, (N,), 8, 8, torch.bfloat16, "meta", choice.triton())
    site.step = StepMap(80, "meta", tiled=True)
    site.step.update(slots_T)

    def product(_layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        streams.put("base")
        return x.new_empty(len(x), N)

    made = SimpleNamespace(
        site=site, memory=None, base_layer=None, has_product=False,
        _get_quant_method=lambda: SimpleNamespace(apply=product), _lora_stream=side,
        _events=[Event("begin", streams), Event("shrunk", streams)],
    )  # fmt: skip
    made.run = RoutedLinear._apply_async_impl.__get__(made)
    return made


def fetching(streams: Streams, slots_T: np.ndarray, side: str | None) -> Any:
    """The same with the setting `prefetch_weights`."""
    from vllm_lora_ext.kernels.gated_lora import prefetch_in_order

    made = layer(streams, slots_T, side)
    prefetch_in_order([made.site])
    return made


x_TK = torch.empty(ROWS, K, dtype=torch.bfloat16, device="meta")
ADAPTED, BASE = np.array([0, 1, -1, 0, -1]), np.full(ROWS, -1)


def test_the_shrink_runs_beside_the_product_and_the_expand_waits_for_both(streams) -> None:
    layer(streams, ADAPTED, "side").run(x_TK)
    assert streams.work == [
        ("main", "record begin"), ("main", "base"), ("side", "wait begin"), ("side", "shrink"),
        ("side", "record shrunk"), ("main", "wait shrunk"), ("main", "expand"),
    ]  # fmt: skip


def test_without_a_second_stream_all_of_it_is_in_order(streams) -> None:
    layer(streams, ADAPTED, None).run(x_TK)
    assert streams.work == [("main", "base"), ("main", "shrink"), ("main", "expand")]


@pytest.mark.parametrize("make", [layer, fetching])
@pytest.mark.parametrize("side", ["side", None])
def test_a_step_without_an_adapter_launches_nothing(side, make, streams) -> None:
    make(streams, BASE, side).run(x_TK)
    assert {what for _, what in streams.work} & {"shrink", "expand", "prefetch"} == set()


def test_weights_are_fetched_behind_the_shrink_and_beside_the_product(streams) -> None:
    """Never in front of the expand on the stream that it runs on."""
    fetching(streams, ADAPTED, "side").run(x_TK)
    assert streams.work == [
        ("main", "record begin"), ("main", "base"), ("side", "wait begin"), ("side", "shrink"),
        ("side", "prefetch"), ("side", "record shrunk"), ("main", "wait shrunk"),
        ("main", "expand"),
    ]  # fmt: skip


def test_none_are_fetched_where_vllm_runs_both_on_one_stream(streams, monkeypatch) -> None:
    want = [("main", "base"), ("main", "shrink"), ("main", "expand")]
    fetching(streams, ADAPTED, None).run(x_TK)
    assert streams.work == want
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture

    monkeypatch.setattr(BreakableCUDAGraphCapture, "is_active", staticmethod(lambda: True))
    streams.work.clear()
    fetching(streams, ADAPTED, "side").run(x_TK)
    assert streams.work == want


def test_the_next_layers_shrink_waits_for_this_ones_expand(streams) -> None:
    """Its result may lie where this one's lay: the allocator gives memory back by stream."""
    first, second = layer(streams, ADAPTED, "side"), layer(streams, ADAPTED, "side")
    first.run(x_TK)
    second.run(x_TK)
    expand = streams.work.index(("main", "expand"))
    begin = streams.work.index(("main", "record begin"), expand)
    wait = streams.work.index(("side", "wait begin"), expand)
    shrink = streams.work.index(("side", "shrink"), expand)
    assert expand < begin < wait < shrink


@pytest.mark.parametrize("make", [layer, fetching])
def test_a_large_step_keeps_to_one_stream(make, streams) -> None:
    """Its product takes all of the GPU."""
    from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS

    for rows, stream in ((MOST_ROWS, "side"), (MOST_ROWS + 1, "main")):
        streams.work.clear()
        x = torch.empty(rows, K, dtype=torch.bfloat16, device="meta")
        make(streams, np.zeros(rows, dtype=int), "side").run(x)
        assert (stream, "shrink") in streams.work
        assert ("side", "prefetch") not in streams.work or stream == "side"


def test_what_an_mlp_block_hands_on_never_leaves_the_main_stream() -> None:
    """Stock's op does not name the memory that the shrink is left in: a compiler could clone it."""
    from vllm_lora_ext.model_patches.layers import RoutedLinear
    from vllm_lora_ext.model_patches.mlp import Block

    def linear() -> Any:
        made = SimpleNamespace(memory=None, _enable_aux_cuda_stream=True)
        made.leave_in = RoutedLinear.leave_in.__get__(made)
        return made

    first, last, act = linear(), linear(), SimpleNamespace(scratch=None)
    scratch: Any = SimpleNamespace(u=torch.empty(1), z=torch.empty(1))
    Block(first, last, SimpleNamespace(), True, act).hand_on(scratch)  # type: ignore[arg-type]
    assert first.memory is scratch.u and last.memory is scratch.z and act.scratch is scratch
    assert not first._enable_aux_cuda_stream and not last._enable_aux_cuda_stream
