"""A captured graph holds the LoRA launches if, and only if, the steps that replay it may need them:
vLLM's own choice of graphs, for every combination of its LoRA options, against the step's map."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SIZES = {1: [1, 2, 4, 8, 16], 3: [3, 6, 12, 24]}
"""Rows of the captured graphs, by the rows of a decoding request: speculation makes them three."""
MAX_SEQS = 8
MODES = ("FULL", "PIECEWISE", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY")
OPTIONS = list(itertools.product((False, True), (False, True), MODES, SIZES))


@pytest.fixture(scope="module", params=(1, 3))
def made(request, tmp_path_factory):
    from tests.model_patches.conftest import make_harness

    folder = tmp_path_factory.mktemp("adapters")
    return make_harness(folder, {}, {"max_loras": request.param, "max_cpu_loras": 4})


@pytest.fixture
def dummies(made):
    """The adapters with which vLLM captures."""
    with made.runner.maybe_setup_dummy_loras(made.config.lora_config):
        yield made


def config(made: Any, specialize: bool, per_count: bool, mode: str, query: int) -> Any:
    """What of an engine's configuration decides which graphs there are."""
    from vllm.config import CUDAGraphMode

    lora = SimpleNamespace(
        max_loras=made.config.lora_config.max_loras, specialize_active_lora=per_count
    )
    compilation = SimpleNamespace(
        cudagraph_specialize_lora=specialize, cudagraph_capture_sizes=SIZES[query],
        max_cudagraph_capture_size=SIZES[query][-1], compile_sizes=[], mode=None, splitting_ops=[],
        cudagraph_mode=CUDAGraphMode[mode], is_attention_compiled_piecewise=lambda: True,
    )  # fmt: skip
    return SimpleNamespace(
        lora_config=lora, compilation_config=compilation, num_speculative_tokens=query - 1,
        speculative_config=None, scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )  # fmt: skip


def active(made: Any) -> bool:
    """Whether the op launches, as it sees it when it is captured or replayed."""
    (wrapper,) = made.manager.punica_wrapper_mapping.values()
    return bool(wrapper.step_map.active)


def batches(max_loras: int, query: int) -> Any:
    """(rows, uniform, adapters) of a step."""
    rows = range(1, SIZES[query][-1] + 2)
    for found in itertools.product(rows, (False, True), range(max_loras + 1)):
        if not found[1] or (found[0] % query == 0 and found[0] <= query * MAX_SEQS):
            yield found


@pytest.mark.parametrize(("specialize", "per_count", "mode", "query"), OPTIONS)
def test_the_first_runner_captures_and_replays_alike(
    specialize, per_count, mode, query, dummies
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    options = config(dummies, specialize, per_count, mode, query)
    dispatcher = CudagraphDispatcher(options)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode[mode], query)
    captured = {}
    for kind, descs in dispatcher.get_capture_descs():
        for desc in descs:
            rows = np.ones(desc.num_tokens, dtype=np.int32)
            with dummies.runner.maybe_select_dummy_loras(
                dummies.config.lora_config, rows, num_active_loras=desc.num_active_loras
            ):
                captured[kind, desc] = active(dummies)
            assert captured[kind, desc] == desc.has_lora
    assert captured
    for rows, uniform, adapters in batches(options.lora_config.max_loras, query):
        kind, desc = dispatcher.dispatch(rows, uniform, adapters > 0, adapters)
        if kind != CUDAGraphMode.NONE:
            assert captured[kind, desc] == (adapters > 0), (rows, uniform, adapters, desc)


@pytest.mark.parametrize(("specialize", "per_count", "mode", "query"), OPTIONS)
def test_the_second_runner_captures_and_replays_alike(
    specialize, per_count, mode, query, dummies, monkeypatch
) -> None:
    import torch
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook, get_lora_capture_cases

    options = config(dummies, specialize, per_count, mode, query)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    cases = get_lora_capture_cases(options.lora_config, options.compilation_config)
    graphs = cudagraph_utils.CudaGraphManager(
        options, torch.device("cpu"), CUDAGraphMode[mode], query, cases
    )
    hook = create_lora_capture_hook(dummies.config.lora_config, dummies.runner)
    captured = {}
    for descs in graphs._capture_descs.values():
        for desc in descs:
            hook(desc.num_active_loras, desc.num_reqs or desc.num_tokens, desc.num_tokens)
            captured[desc] = active(dummies)
            assert captured[desc] == (desc.num_active_loras > 0)
    assert captured
    graphs._graphs_captured = True
    for rows, uniform, adapters in batches(options.lora_config.max_loras, query):
        reqs = rows // query if uniform else min(rows, MAX_SEQS)
        desc = graphs.dispatch(reqs, rows, query if uniform else None, adapters)
        if desc.cg_mode != CUDAGraphMode.NONE:
            assert captured[desc] == (adapters > 0), (rows, uniform, adapters, desc)
    # A rank without work replays a graph with adapters: it has the launches, whatever they find.
    idle = graphs.dispatch(1, 1, None, options.lora_config.max_loras + 1)
    assert idle.cg_mode == CUDAGraphMode.NONE or captured[idle]


def test_a_steps_map_says_what_its_requests_say(made) -> None:
    """The other half: what the dispatchers are told of a step is what its map has."""
    requests = [made.random(f"graphs-{i}") for i in range(made.config.lora_config.max_loras)]
    for request in requests:
        made.worker.add_adapter(request)
    for count in range(len(requests) + 1):
        made.step(None, *requests[:count])
        assert active(made) == (count > 0)
