"""The recorder between vLLM's step and the sites' hooks, without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from make_adapters import random_spec

from tests.ranks import Ranks
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gated_lora_,
    register_site,
)
from vllm_lora_ext.model_patches import rows, trace
from vllm_lora_ext.model_patches.config import check_trace
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.refused import RefusedRequest
from vllm_lora_ext.model_patches.rows import Rows
from vllm_lora_ext.model_patches.trace import Recorder
from vllm_lora_ext.model_patches.trace_http import _check
from vllm_lora_ext.trace.gates import slice_gates

K, N, Q, UP = 12, 10, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def module(seed: int, out: int = N) -> RoutedModule:
    spec = random_spec(np.random.default_rng(seed), sources=["router", "self", "prototype"])
    draw = torch.Generator().manual_seed(seed)
    rank = sum(spec.blocks)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return RoutedModule(
        normal(rank, K), normal(out, rank), spec,
        router_GK=None if spec.source == "self" else normal(spec.num_gates, K),
        bias_G=None if spec.bias == "none" else normal(spec.num_gates),
        head_K=normal(K) if spec.threshold_head else None, head_bias=0.3,
    )  # fmt: skip


def layer(site: Site, reduces: bool) -> RoutedLinear:
    made = RoutedLinear.__new__(RoutedLinear)
    torch.nn.Module.__init__(made)
    made.site, made.reduces = site, reduces
    return made


def site_of(m: RoutedModule, step: StepMap, width: int = K, slices: int = 1) -> Site:
    made = Site(2, width, (N,) * slices, m.rank, max(1, m.gate.router_rows), torch.float32, "cpu")
    made.step = step
    return made


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "wrap_runners", lambda: None)
    monkeypatch.setattr(trace, "_add_rpc", lambda: None)


def recorder_of(layers: dict[str, RoutedLinear], adapter: RoutedAdapter, placed: Any) -> Recorder:
    called = {id(module): name for name, module in adapter.modules.items()}
    names = {layer: tuple(called[id(p)] for p in parts if p) for layer, parts in placed.items()}
    model = SimpleNamespace(host=SimpleNamespace(system=adapter.system, names=names, blocks={}))
    manager = SimpleNamespace(
        modules=layers, blocks={}, model=torch.nn.Linear(1, 1), base_name="base",
        lora_index_to_id=[9, 7], list_adapters=lambda: {7: model},
    )  # fmt: skip
    manager.rows = Rows(manager)
    return Recorder(manager)


def begin(recorder: Recorder, scheduled: Any, keys: list[str], counts: list[int]) -> None:
    """A step as far as the forward pass; its rows in the order of `keys`."""
    made = recorder._manager.rows
    made.begin_step(scheduled)
    made.take_order(keys, counts)
    made.slots_are_set()


def end(recorder: Recorder) -> None:
    recorder._manager.rows.end_step()


def step_of(new: dict[str, Any], running: dict[str, int], finished: Any = ()) -> Any:
    """A `SchedulerOutput`: new requests with their lora ids, running ones with their positions."""
    asked = SimpleNamespace(extra_args={"lora_ext_trace": 1})
    requests = [
        SimpleNamespace(
            req_id=key, num_computed_tokens=0, prompt_token_ids=[1, 2, 3, 4],
            sampling_params=SimpleNamespace(extra_args=None) if key == "untraced" else asked,
            lora_request=lora and SimpleNamespace(lora_int_id=lora, lora_name="mine"),
        )
        for key, lora in new.items()
    ]  # fmt: skip
    cached = SimpleNamespace(req_ids=list(running), num_computed_tokens=list(running.values()))
    return SimpleNamespace(
        scheduled_new_reqs=requests, scheduled_cached_reqs=cached, finished_req_ids=set(finished),
        num_scheduled_tokens=dict.fromkeys([*new, *running], 1),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_traced_requests_only(seed: int) -> None:
    """Two steps: a chunk of the prompt among other requests, then the rest in another row."""
    m, step = module(seed), StepMap(16)
    site = site_of(m, step)
    site.write(1, [m])
    number = register_site(site)
    recorder = recorder_of({UP: layer(site, False)}, RoutedAdapter({UP: m}, "mola"), {UP: [m]})
    x_TK = torch.randn(8, K, generator=torch.Generator().manual_seed(seed))

    first = step_of({"untraced": 7, "r": 7, "base": None}, {})
    begin(recorder, first, ["untraced", "r", "base"], [2, 3, 1])
    step.update(np.array([1, 1, 1, 1, 1, -1]))
    gated_lora_(torch.zeros(8, N), x_TK, number)
    end(recorder)
    gated_lora_(torch.zeros(8, N), x_TK, number)  # a warm-up run: no request's rows
    begin(recorder, step_of({}, {"r": 3, "untraced": 2}), ["r", "untraced"], [1, 1])
    step.update(np.array([1, 1]))
    gated_lora_(torch.zeros(8, N), x_TK[6:], number)
    end(recorder)

    found = recorder.store.get("r")
    want_TG = slice_gates(m, x_TK[[2, 3, 4, 6]])
    assert (found.system, found.adapter, found.base) == ("mola", "mine", "base")
    assert torch.allclose(found.weights[UP], want_TG, atol=1e-5)
    load = torch.tensor(recorder.load.sums()["mine"], dtype=torch.float64)
    assert torch.allclose(load, want_TG.abs().sum(0).double(), atol=1e-4)
    assert recorder.store.get("base").weights == {}
    with pytest.raises(AdapterError) as caught:
        recorder.store.get("untraced")
    assert caught.value.code == "not_traced"


@pytest.mark.parametrize("seed", range(6))
def test_a_sharded_input(seed: int) -> None:
    """Row-parallel: the logits of all shards are summed before the gate, and so recorded."""
    m, step, ranks = module(seed), StepMap(8), Ranks()
    half = K // 2
    parts = []
    for cut in (slice(0, half), slice(half, K)):
        site = site_of(m, step, half)
        router_GK = None if m.router_GK is None else m.router_GK[:, cut]
        head_K = None if m.head_K is None else m.head_K[cut]
        site.write(1, [replace(m, a_RK=m.a_RK[:, cut], router_GK=router_GK, head_K=head_K)])
        site.reduce = ranks.sum_
        parts.append((site, register_site(site), cut))
    first = layer(parts[0][0], True)
    recorder = recorder_of({UP: first}, RoutedAdapter({UP: m}, "mola"), {UP: [m]})
    x_TK = torch.randn(5, K, generator=torch.Generator().manual_seed(seed))
    begin(recorder, step_of({"base": None, "r": 7}, {}), ["base", "r"], [1, 4])
    step.update(np.array([-1, 1, 1, 1, 1]))

    def one(rank: int) -> None:
        _, handle, cut = parts[rank]
        gated_lora_(torch.zeros(5, N), x_TK[:, cut].contiguous(), handle)

    ranks.run(one)
    found = recorder.store.get("r").weights[UP]
    assert torch.allclose(found, slice_gates(m, x_TK[1:]), atol=1e-5)


def test_slices_have_the_files_names() -> None:
    """A fused layer: one part per slice, one of them without an adapter; or one part for all."""
    first, third, step = module(1), module(2), StepMap(8)
    rank = max(first.rank, third.rank)
    site = Site(2, K, (N, N, N), rank, 64, torch.float32, "cpu")
    site.step = step
    site.write(1, [first, None, third])
    adapter = RoutedAdapter({Q: first, f"x.{UP}": third}, "mola")
    recorder = recorder_of({"qkv": layer(site, False)}, adapter, {"qkv": [first, None, third]})
    x_TK = torch.randn(2, K)

    def once() -> dict[str, torch.Tensor]:
        begin(recorder, step_of({"r": 7}, {}), ["r"], [2])
        step.update(np.array([1, 1]))
        gated_lora_(torch.zeros(2, 3 * N), x_TK, register_site(site))
        end(recorder)
        return recorder.store.get("r").weights

    found = once()
    assert set(found) == {Q, f"x.{UP}"}
    assert torch.allclose(found[f"x.{UP}"], slice_gates(third, x_TK), atol=1e-5)

    whole = RoutedAdapter({"model.fused": first}, "mola")
    recorder = recorder_of({"qkv": layer(site, False)}, whole, {"qkv": [first]})
    site.write(1, [first] * 3)
    assert set(once()) == {"model.fused"}


def config(spec: Any = None, tower: bool = False, dbo: bool = False) -> Any:
    return SimpleNamespace(
        speculative_config=spec, lora_config=SimpleNamespace(enable_tower_connector_lora=tower),
        parallel_config=SimpleNamespace(use_ubatching=dbo),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("graphs", "engine"),
    [(True, config()), (False, config(spec=object())), (False, config(tower=True)),
     (False, config(dbo=True))],
)  # fmt: skip
def test_engines_that_keep_no_traces(graphs: bool, engine: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        check_trace(engine, graphs)
    assert caught.value.code == "bad_settings"


def test_an_engine_that_keeps_traces() -> None:
    check_trace(config(), False)


def asking(value: object) -> SimpleNamespace:
    params = SimpleNamespace(extra_args={"lora_ext_trace": value}, skip_reading_prefix_cache=None)
    return SimpleNamespace(
        params=params, sampling_params=params, pooling_params=None, prompt_token_ids=[5],
        prompt_embeds=None, mm_features=None,
    )  # fmt: skip


def test_a_request_is_marked_or_refused_as_the_clients_fault() -> None:
    on = SimpleNamespace(additional_config={"lora_ext": {"trace": True}})
    for value, marked in ((1, True), (0, None)):
        request = asking(value)
        _check(request, on)
        params = request.sampling_params
        assert params.skip_reading_prefix_cache is marked
    for value, config, code in ((1, None, "not_traced"), ("perhaps", {}, "bad_value")):
        request = asking(value)
        with pytest.raises(RefusedRequest) as caught:
            _check(request, SimpleNamespace(additional_config=config))
        assert caught.value.code == code
        again = AdapterError.parse(str(caught.value))
        assert again is not None and (again.code, again.text) == (code, caught.value.text)
