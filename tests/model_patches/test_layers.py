"""The layer classes on fake base layers: what they launch and communicate, and what they add."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm.lora.layers.row_parallel_linear as stock
from torch import nn
from vllm.model_executor.layers.linear import RowParallelLinear

from tests.make_adapters import normal, random_module, router_spec
from tests.ranks import Ranks
from vllm_lora_ext.kernels.gated_lora import StepMap, gated_lora_reference
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.model_patches import layers
from vllm_lora_ext.model_patches.backend import Building, build_with
from vllm_lora_ext.routing import GateSpec

K, N, T = 24, 14, 5
SELF = GateSpec(source="self", blocks=(1,) * 6, select="top_k", key="abs", k=2, weight="one")


def row_parallel(weight_NK: torch.Tensor, rank: int) -> RowParallelLinear:
    """A base layer of two ranks, without an engine."""
    base = RowParallelLinear.__new__(RowParallelLinear)
    nn.Module.__init__(base)
    half = K // 2
    base.weight = nn.Parameter(weight_NK[:, rank * half :][:, :half].contiguous(), False)
    base.input_size, base.input_size_per_partition, base.output_size = K, half, N
    base.tp_size, base.tp_rank, base.bias = 2, rank, None
    base.input_is_parallel, base.reduce_results = True, True
    base.skip_bias_add = base.return_bias = False
    base.quant_method = SimpleNamespace(apply=lambda layer, x, bias: x @ base.weight.t())
    return base


NORMALISED = replace(router_spec(), normalise="layer", product=True)


class Layer:
    """A row-parallel layer on two ranks, and its two collectives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fully: bool = False) -> None:
        self.rng, self.step = np.random.default_rng(0), StepMap(16)
        self.own, self.ours = Ranks(), Ranks()
        self.ours._here, self.ours._turn = self.own._here, self.own._turn
        monkeypatch.setattr(stock, "tensor_model_parallel_all_reduce", self.own.sum_)
        monkeypatch.setattr(layers, "tensor_model_parallel_all_reduce", self.ours.sum_)
        self.weight_NK = normal(self.rng, N, K)
        config = SimpleNamespace(
            max_lora_rank=24, lora_dtype=torch.float32, fully_sharded_loras=fully
        )
        self.layers = []
        for rank in range(2):
            layer = layers._ours(stock.RowParallelLinearWithLoRA)(
                row_parallel(self.weight_NK, rank)
            )
            with build_with(Building(40, choice.without_triton("cpu"), graphs=False)):
                layer.create_lora_weights(3, config)
            layer.set_mapping(SimpleNamespace(step_map=self.step))
            self.layers.append(layer)
        gates = (GateSpec(), router_spec(), SELF)
        self.slots = [[random_module(self.rng, K, N, gate)] for gate in gates]
        for layer in self.layers:
            for slot, parts in enumerate(self.slots):
                layer.load(slot, parts)

    def put(self, slot: int, gate: GateSpec) -> None:
        self.slots[slot] = [random_module(self.rng, K, N, gate)]
        for layer in self.layers:
            layer.load(slot, self.slots[slot])

    def check(self, slots: list[int]) -> list[tuple[int, ...]]:
        """Both ranks' output against the whole layer's; returns what was summed beside it."""
        slots_T, x_TK = np.array(slots), normal(self.rng, len(slots), K)
        self.step.update(slots_T)
        del self.own.summed[:], self.ours.summed[:]
        shards = [x.contiguous() for x in x_TK.chunk(2, dim=1)]
        outputs = self.own.run(lambda rank: self.layers[rank](shards[rank]))
        assert torch.equal(*outputs)
        want = x_TK @ self.weight_NK.t()
        want += gated_lora_reference(x_TK, torch.tensor(slots_T), self.slots, (N,))
        torch.testing.assert_close(outputs[0], want, rtol=1e-4, atol=1e-4)
        assert self.own.summed == [(len(slots), N)]  # as without LoRA
        return list(self.ours.summed)


def test_a_row_parallel_layer_sums_no_more_than_its_gates_need(monkeypatch):
    layer = Layer(monkeypatch)
    gates = layer.slots[1][0].gate.num_gates
    assert layer.check([-1] * T) == []
    assert layer.check([0, -1, 0]) == []
    assert layer.check([1, 0, -1]) == [(3, gates)]
    assert layer.check([2, 0]) == [(2, layer.slots[2][0].rank)]
    assert layer.check([0] * T) == []
    layer.put(2, NORMALISED)  # beside the logits, the sum of x and of its squares
    assert layer.check([2, 0, -1]) == [(3, NORMALISED.num_gates + 2)]


def test_fully_sharded_it_sums_all_that_its_adapters_have(monkeypatch):
    """B is a shard as well, of y: plain rows, too, then need the sum of all ranks' A x."""
    layer = Layer(monkeypatch, fully=True)
    assert [one.site.bt_SRN[0].shape[2] for one in layer.layers] == [N // 2] * 2
    plain, routed, own = (parts[0] for parts in layer.slots)
    width = routed.rank + routed.gate.num_gates
    assert layer.check([-1] * T) == []
    assert layer.check([0, -1, 0]) == [(3, plain.rank)]
    assert layer.check([1, 0, -1]) == [(3, max(width, plain.rank))]
    assert layer.check([2, 0]) == [(2, max(own.rank, plain.rank))]
    layer.put(2, NORMALISED)
    width = sum(NORMALISED.blocks) + NORMALISED.num_gates + 2
    assert layer.check([2, 0, -1]) == [(3, max(width, plain.rank))]
