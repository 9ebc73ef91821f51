"""The output matrix's LoRA: every row gets its own slot's, whoever asks for its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.lora.layers.logits_processor as stock
import vllm.lora.utils as lora_utils
import vllm.model_executor.layers.logits_processor as base
import vllm.v1.worker.gpu.model_runner as v2
import vllm.v1.worker.gpu.sample.logprob as logprob
import vllm.v1.worker.gpu.sample.prompt_logprob as prompt_logprob
import vllm.v1.worker.gpu_model_runner as v1
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import Manager, RunnerV1, RunnerV2, Schedule, run, without_a_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches import logits, rows
from vllm_lora_ext.model_patches.logits import RoutedLogits, follow_rows
from vllm_lora_ext.model_patches.rows import Rows
from vllm_lora_ext.routing import GateSpec

K, V, PADDED, R, SLOTS = 12, 21, 24, 4, 4


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with without_a_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "get_tensor_model_parallel_world_size", lambda: 1)
        patch.setattr(stock, "get_tensor_model_parallel_rank", lambda: 0)
        patch.setattr(base, "get_current_vllm_config", lambda: SimpleNamespace(model_config=None))
        patch.setattr(logprob, "_ranks_kernel", {(n,): lambda *_, **__: None for n in range(6)})
        patch.setattr(prompt_logprob, "CHUNK_SIZE", 5)  # several chunks over all requests' rows
        ids = "get_prompt_logprobs_token_ids"
        patch.setattr(prompt_logprob, ids, lambda n, *_: torch.zeros(n, dtype=torch.int64))
        yield


class Head:
    """A layer with an adapter in two of its slots, and what each row's logits are to be."""

    def __init__(self, dtype: torch.dtype = torch.float32, slots: tuple[int, ...] = (0, 2)) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(PADDED, K, generator=draw).to(dtype)
        self.lm_head: Any = SimpleNamespace(
            quant_method=SimpleNamespace(apply=lambda layer, x, bias: x @ self.weight.t()),
            tp_size=1,
        )
        self.step = StepMap(512)
        self.rows = Rows(Manager())
        below: Any = base.LogitsProcessor(V)
        below._gather_logits = lambda y_NV: y_NV  # one rank
        self.layer = RoutedLogits(below, K, dtype, torch.device("cpu"), None)
        config: Any = SimpleNamespace(max_lora_rank=R, lora_dtype=dtype)
        self.layer.create_lora_weights(SLOTS, config)
        self.layer.set_mapping(SimpleNamespace(step_map=self.step))
        follow_rows(self.rows, {"lm_head": self.layer})
        self.pairs = {
            slot: (torch.randn(R - 1, K, generator=draw), torch.randn(V, R - 1, generator=draw))
            for slot in slots
        }
        for slot, (a_RK, b_VR) in self.pairs.items():
            self.layer.set_lora(slot, a_RK.to(dtype), b_VR.to(dtype))

    def __call__(self, x_NK: torch.Tensor) -> torch.Tensor:
        return self.layer(self.lm_head, x_NK)

    def want(self, x_NK: torch.Tensor, slots_N: Any) -> torch.Tensor:
        y_NV = (x_NK.float() @ self.weight.float().t())[:, :V]
        for i, slot in enumerate(slots_N):
            if slot in self.pairs:
                a_RK, b_VR = self.pairs[slot]
                y_NV[i] += b_VR @ (a_RK @ x_NK[i].float())
        return y_NV


class Runs:
    """V2's steps with a model that is nothing but its output matrix."""

    def __init__(self, seed: int) -> None:
        self.head, self.manager = Head(), Manager()
        self.manager.rows = self.head.rows
        self.runner = RunnerV2(self.manager)
        self.runner.schedule = self.schedule = Schedule(np.random.default_rng(seed), True)
        self.runner.forward = self.forward
        self.worker = prompt_logprob.PromptLogprobsWorker(6, "cpu", "raw_logits")  # type: ignore[arg-type]
        self.worker.uses_prompt_logprobs[:] = True
        self.hidden_TK: Any = None
        self.prompts = self.tokens = 0

    def forward(self) -> None:
        loras = self.runner.token_loras
        self.slots_T = np.array([self.manager.slot(i) for i in loras])
        self.head.step.update(self.slots_T)
        padded = self.runner.batch.num_tokens_after_padding
        self.hidden_TK = torch.randn(padded + 3, K)[3:]  # a part of the graphs' buffer
        self.runner.execute_model_state = SimpleNamespace(
            hidden_states=self.hidden_TK, input_batch=self.runner.batch
        )

    def asks(self, x_NK: torch.Tensor, rows_N: Any) -> None:
        assert torch.allclose(
            self.head(x_NK), self.head.want(x_NK, self.slots_T[rows_N]), atol=1e-4
        )

    def sample_tokens(self, _runner: Any, _grammar: Any) -> None:
        """Stock's, from here to the calls of `compute_logits`."""
        batch, lens = self.runner.batch, self.runner.req_states.prompt_len.np
        picked_N = batch.logits_indices
        self.asks(self.hidden_TK[picked_N], picked_N.numpy())
        self.worker.in_progress_prompt_logprobs = {key: [] for key in batch.req_ids}
        got = self.worker.compute_prompt_logprobs(
            self.head, self.hidden_TK, batch, None, None, lens  # type: ignore[arg-type]
        )  # fmt: skip
        for i, key in enumerate(batch.req_ids):
            start, stop = batch.query_start_loc_np[i : i + 2]
            if key in got:  # of the prompt's last chunk
                want = self.head.want(
                    self.hidden_TK[start : stop - 1], self.slots_T[start : stop - 1]
                )
                assert torch.allclose(got[key].logprobs[:, 0], want[:, 0], atol=1e-4)
                self.prompts += 1
        self._score_tokens(batch, lens)

    def _score_tokens(self, batch: Any, lens: np.ndarray) -> None:
        """`prompt_logprob_token_ids`, of the first request."""
        at, count = batch.num_computed_prefill_tokens_np[0], batch.num_scheduled_tokens[0]
        ids, pad = torch.zeros(99, 1, dtype=torch.int64), torch.zeros(99, 1, dtype=torch.bool)
        scored = prompt_logprob._TokenIdScores(ids, pad, int(at))
        self.worker.token_id_scores = {batch.req_ids[0]: scored}
        self.worker.compute_prompt_token_id_logprobs(self.head, self.hidden_TK, batch, lens)
        if scored.scores is not None:
            stop = min(at + count, lens[batch.idx_mapping_np[0]] - 1) - at
            want = self.head.want(self.hidden_TK[:stop], self.slots_T[:stop])
            assert torch.allclose(scored.scores[:stop, 0], want[:, 0], atol=1e-4)
            self.tokens += 1


def steps(seed: int, count: int) -> Runs:
    runs = Runs(seed)
    sample_tokens = rows._tell_logits_v2(runs.sample_tokens)
    for _ in range(count):
        drawn = runs.schedule.draw()
        run(runs.runner, drawn.scheduled)
        if drawn.counts:
            sample_tokens(runs.runner, None)
        runs.schedule.done(drawn)
    return runs


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_sampled_prompt_and_draft_rows_of_v2(seed: int) -> None:
    steps(seed, 10)


def test_prompts_were_scored() -> None:
    runs = steps(0, 60)
    assert runs.prompts > 5 and runs.tokens > 5


def test_v1_tells_of_both_ways_to_ask() -> None:
    head, runner = Head(), RunnerV1(Manager())
    runner.lora_manager._adapter_manager.rows = head.rows
    slots_T, hidden_TK = np.array([0, 0, -1, 2, 2, 1]), torch.randn(8, K)
    head.step.update(slots_T)
    picked_N = torch.tensor([1, 2, 5])
    prepared = rows._tell_sampled_v1(lambda _self, *_: (picked_N, None, 1))
    assert prepared(runner, None, None)[0] is picked_N
    x_NK = hidden_TK[picked_N]
    assert torch.allclose(head(x_NK), head.want(x_NK, slots_T[picked_N.numpy()]), atol=1e-4)
    head.rows.end_step()

    def prompt(_self: Any, hidden: torch.Tensor, _counts: Any) -> None:
        for start, stop in ((0, 2), (3, 6)):
            want = head.want(hidden[start:stop], slots_T[start:stop])
            assert torch.allclose(head(hidden[start:stop]), want, atol=1e-4)

    rows._tell_prompt_v1(prompt)(runner, hidden_TK[:6], {})


def test_the_runners_are_wrapped() -> None:
    Head()
    for cls, names in (
        (v1.GPUModelRunner, ("_prepare_inputs", "_get_prompt_logprobs_dict")),
        (v2.GPUModelRunner, ("prepare_inputs", "sample_tokens")),
    ):
        assert all(hasattr(getattr(cls, name), "__wrapped__") for name in names)
    before = v2.GPUModelRunner.sample_tokens
    Head()
    assert v2.GPUModelRunner.sample_tokens is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    head, slots_T, x_NK = Head(dtype), np.array([2, -1, 0, 2]), torch.randn(4, K).to(dtype)
    head.step.update(slots_T)
    head.rows.take_sampled(torch.arange(4))
    want, got = head.want(x_NK, slots_T), head(x_NK)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), want, rtol=0.02, atol=0.1)


class Calls(TorchDispatchMode):
    """The names of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing() -> None:
    head = Head()
    head.step.update(np.array([2, -1, 0, 2]))
    head.rows.take_sampled(torch.arange(4))
    with Calls() as calls:
        head(torch.randn(4, K))
    assert calls.names.count("addmm_") == 2
    waits = {"_local_scalar_dense", "item", "nonzero", "_unique2", "unique_dim", "sort", "copy_"}
    assert not waits & set(calls.names), calls.names


@pytest.mark.parametrize("slots_T", [[-1, -1, -1], [1, -1, 1], [3, 3, 3]])
def test_unused_weights_are_not_read(slots_T: list[int]) -> None:
    """Neither slot 1 nor 3 has a LoRA here: one product, the base model's."""
    head, x_NK = Head(), torch.randn(3, K)
    head.layer.lora_b_stacked.fill_(float("nan"))
    head.step.update(np.array(slots_T))
    head.rows.take_sampled(torch.arange(3))
    with Calls() as calls:
        got = head(x_NK)
    assert torch.equal(got, head.want(x_NK, [-1] * 3))
    assert sum(name in ("mm", "addmm_", "addmm") for name in calls.names) == 1


def test_another_slots_weights_are_not_read() -> None:
    head, x_NK = Head(), torch.randn(3, K)
    head.layer.lora_b_stacked[0].fill_(float("nan"))
    head.step.update(np.array([2, -1, 2]))
    head.rows.take_sampled(torch.arange(3))
    assert torch.allclose(head(x_NK), head.want(x_NK, [2, -1, 2]), atol=1e-4)


def test_slots_are_filled_and_emptied() -> None:
    head, x_NK = Head(), torch.randn(2, K)
    head.step.update(np.array([0, 2]))
    head.rows.take_sampled(torch.arange(2))
    head.layer.reset_lora(0)
    assert torch.allclose(head(x_NK), head.want(x_NK, [-1, 2]), atol=1e-4)
    head.layer.reset_lora(2)
    head.layer.reset_lora(1)
    assert torch.equal(head(x_NK), head.want(x_NK, [-1, -1]))


def test_vllm_takes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_utils, "LogitsProcessorWithLoRA", stock.LogitsProcessorWithLoRA)
    logits.apply()
    lm_head: Any = SimpleNamespace(
        embedding_dim=K, weight=torch.zeros(V, K), get_sharded_to_full_mapping=lambda: None
    )
    config: Any = SimpleNamespace(max_lora_rank=R, lora_dtype=torch.float32)
    made = lora_utils.from_layer_logits_processor(base.LogitsProcessor(V), lm_head, SLOTS, config)
    assert isinstance(made, RoutedLogits)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_gates_are_refused_where_none_are_computed(harness: Callable[..., Any], name: str) -> None:
    """Nothing of the adapter is kept."""
    made = harness()
    vocabulary, width = 512, 128
    k, n = (width, vocabulary) if name == "lm_head" else (vocabulary, width)
    gate = GateSpec(source="router", blocks=(2, 2), score="softmax", select="top_k", k=1)
    gated = RoutedModule(torch.zeros(4, k), torch.zeros(n, 4), gate, router_GK=torch.zeros(2, k))
    if name != "lm_head":
        gated = dataclasses.replace(gated, kind="embedding")
    request = made.save("gated", RoutedAdapter({name: gated}, "mola"))
    with pytest.raises(AdapterError) as caught:
        made.worker.add_adapter(request)
    assert caught.value.code == "unsupported_feature" and name in str(caught.value)
    assert made.worker.list_adapters() == set()
    plain = RoutedModule(gated.a_RK, gated.b_NR, kind=gated.kind)
    assert made.worker.add_adapter(made.save("plain", RoutedAdapter({name: plain}, "mola")))
