"""The graph of a step without sums: who gets it, and what it was captured with. No GPU is needed:
vLLM's own dispatchers and hooks run, and nothing is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.make_adapters import router_spec
from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.routing import GateSpec

MAX_LORAS = 3
PLAIN, ROUTED, ELSEWHERE = 1, 2, 3  # adapters; the last one's router stands where nothing is summed


class Engine:
    """A manager as `graphs` sees it."""

    def __init__(self) -> None:
        self.step = StepMap(64)
        self.punica_wrapper_mapping = {"text": SimpleNamespace(step_map=self.step)}

    def sums(self, lora_ids: Iterator[int]) -> bool:
        return ROUTED in lora_ids


@pytest.fixture
def config(request: pytest.FixtureRequest) -> Any:
    from vllm.config import CUDAGraphMode

    return SimpleNamespace(
        lora_config=SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_specialize_lora=True,
            max_cudagraph_capture_size=8, cudagraph_capture_sizes=[1, 4, 8], compile_sizes=[],
            is_attention_compiled_piecewise=lambda: True,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8), num_speculative_tokens=0,
        parallel_config=SimpleNamespace(tensor_parallel_size=2, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False), speculative_config=None,
    )  # fmt: skip


@pytest.fixture
def engine(config: Any) -> Engine:
    import vllm.v1.worker.gpu.model_runner
    import vllm.v1.worker.gpu_model_runner  # noqa: F401

    from vllm_lora_ext.model_patches.graphs import capture_apart

    made = Engine()
    capture_apart(made, config)
    return made


class V1:
    """Its dispatcher, asked as the runner asks it."""

    def __init__(self, config: Any) -> None:
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

        self.config, self.dispatcher = config, CudagraphDispatcher(config)
        for _ in range(2):  # vLLM does so again when it has resolved the mode
            self.dispatcher.initialize_cudagraph_keys(config.compilation_config.cudagraph_mode)

    def captured(self) -> set[int]:
        return {d.num_active_loras for _, descs in self.dispatcher.get_capture_descs()
                for d in descs}  # fmt: skip

    def found(self, ids: set[int]) -> int:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        runner = SimpleNamespace(
            _is_uniform_decode=lambda **_: True, uniform_decode_query_len=1,
            model_config=SimpleNamespace(is_encoder_decoder=False), vllm_config=self.config,
            lora_config=self.config.lora_config, cudagraph_dispatcher=self.dispatcher,
            input_batch=SimpleNamespace(lora_id_to_lora_request=dict.fromkeys(ids)),
        )  # fmt: skip
        self.config.observability_config = SimpleNamespace(cudagraph_metrics=False)
        mode, desc, *_ = GPUModelRunner._determine_batch_execution_and_padding(
            runner, num_tokens=3, num_reqs=3, num_scheduled_tokens_np=np.ones(3, dtype=np.int32),
            max_num_scheduled_tokens=1,
        )  # fmt: skip
        assert mode.name == "FULL"
        assert desc.has_lora == bool(ids)
        number: int = desc.num_active_loras
        return number


class V2:
    """Its graph manager, asked as the runner asks it."""

    def __init__(self, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.worker.gpu import cudagraph_utils, lora_utils

        group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
        monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
        platform = SimpleNamespace(get_global_graph_pool=lambda: None)
        monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
        self.config, mode = config, config.compilation_config.cudagraph_mode
        self.graphs = cudagraph_utils.ModelCudaGraphManager(
            config, "cpu", mode, decode_query_len=1,
            lora_capture_cases=lora_utils.get_lora_capture_cases(
                config.lora_config, config.compilation_config
            ),
        )  # fmt: skip
        self.graphs._graphs_captured = True

    def captured(self) -> set[int]:
        return {d.num_active_loras for descs in self.graphs._capture_descs.values() for d in descs}

    def found(self, ids: set[int]) -> int:
        from vllm.v1.worker.gpu import lora_utils, model_runner

        state = lora_utils.LoraState(8)
        for i in ids:
            state.add_request(str(i), i, _request(i))
        number = model_runner.get_num_active_loras_for_dispatch(
            self.config.lora_config, state, [*map(str, ids)], False
        )
        desc = self.graphs.dispatch(3, 3, 1, number)
        assert desc.cg_mode.name == "FULL"
        return int(desc.num_active_loras)


def _request(lora_id: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"a{lora_id}", lora_id, "/nowhere")


@pytest.fixture(params=["v1", "v2"])
def runner(
    request: pytest.FixtureRequest, config: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> V1 | V2:
    return V1(config) if request.param == "v1" else V2(config, monkeypatch)


STEPS = [
    (set(), 0), ({PLAIN}, MAX_LORAS + 2), ({PLAIN, ELSEWHERE}, MAX_LORAS + 2),
    ({ROUTED}, MAX_LORAS + 1), ({PLAIN, ROUTED, ELSEWHERE}, MAX_LORAS + 1),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "case"), STEPS, ids=str)
def test_steps_without_sums_have_graphs_of_their_own(runner: Any, ids: set[int], case: int) -> None:
    assert runner.captured() == {0, MAX_LORAS + 1, MAX_LORAS + 2}
    assert runner.found(ids) == case


class Runner:
    """vLLM's own mixin, with the manager of the engine."""

    def __init__(self, engine: Engine) -> None:
        self.lora_manager = SimpleNamespace(_adapter_manager=engine)
        self.selected: set[int] = set()

    def _set_active_loras(self, _prompt: Any, tokens: Any, requests: set[Any], _kind: Any) -> None:
        self.lora_manager._adapter_manager.step.update(np.asarray(tokens) - 1)
        self.selected = {r.lora_int_id for r in requests}


@pytest.mark.parametrize("case", [MAX_LORAS + 1, MAX_LORAS + 2])
def test_a_graph_is_captured_for_what_it_is_found_by(
    config: Any, engine: Engine, case: int
) -> None:
    """With the worst of rows: an adapter in every slot; and the next step speaks for itself."""
    from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    runner = Runner(engine)
    runner.maybe_select_dummy_loras = (  # type: ignore[attr-defined]
        lambda *a, **k: LoRAModelRunnerMixin.maybe_select_dummy_loras(runner, *a, **k)
    )
    hook = create_lora_capture_hook(config.lora_config, runner)
    assert hook is not None
    hook(case, 4, 8)
    assert engine.step.frozen is (case == MAX_LORAS + 1)
    assert engine.step.active and len(runner.selected) == MAX_LORAS
    engine.step.update(np.zeros(4, dtype=int))
    assert engine.step.frozen is None


def test_another_engine_and_other_keys_are_left_alone(
    config: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_lora_ext.model_patches.graphs import capture_apart

    lora = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False)
    stock = SimpleNamespace(**vars(config) | {"lora_config": lora})
    lora = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=True)
    counting = SimpleNamespace(**vars(config) | {"lora_config": lora})
    capture_apart(engine, counting)
    for other, cases in ((stock, {0, 4}), (counting, {0, 1, 2, 4})):
        for runner in (V1(other), V2(other, monkeypatch)):
            assert runner.captured() == cases
            assert runner.found({PLAIN}) in cases - {0}


def test_what_a_manager_says_of_its_adapters(harness: Callable[..., Any]) -> None:
    h = harness()
    plain, routed, given = (
        h.random(name, specs=[spec])
        for name, spec in (
            ("plain", GateSpec()), ("routed", router_spec()), ("routed2", router_spec()),
        )
    )  # fmt: skip
    ids = [r.lora_int_id for r in (plain, routed, given)]
    for request in (plain, routed):
        h.worker.load(request, None, ())
    manager = h.manager
    assert not manager.sums(ids[:2])  # one rank
    for layer in manager.modules.values():
        layer.reduces = True
    for model in manager._registered_adapters.cache.values():
        model.sums = None
    assert [manager.sums([i]) for i in ids] == [False, True, True]  # the last one is not here
    assert manager.sums(ids[:2]) and not manager.sums([]) and not manager.sums(ids[:1])


def test_a_dummy_run_of_stocks_own_says_what_is_captured(harness: Callable[..., Any]) -> None:
    """It gives the number of adapters by its place."""
    from vllm_lora_ext.model_patches.graphs import capture_apart, no_sums

    h = harness()
    capture_apart(h.manager, h.config)
    lora, one = h.config.lora_config, np.ones(1, dtype=np.int32)
    (step,) = {
        id(p.step_map): p.step_map for p in h.manager.punica_wrapper_mapping.values()
    }.values()
    for active, frozen in ((1, True), (no_sums(lora), False)):
        with h.runner.maybe_dummy_run_with_lora(lora, one, one, num_active_loras=active):
            assert step.frozen is frozen
