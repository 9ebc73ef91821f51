"""CUDA graphs of their own for steps in which no gate reads a sum over the ranks.

Targets: what chooses the graph of a step, on both runners (`CudagraphDispatcher`,
`ModelCudaGraphManager`, and what counts a step's adapters for them), and
`LoRAModelRunnerMixin.maybe_select_dummy_loras`, which sets the rows that a graph is captured with.

Under tensor parallelism a router's logits in a row-parallel layer are partial sums, and a captured
step must sum them for whatever adapters it will serve (`kernels.gated_lora.sharded`). vLLM's graphs
have a key for the number of adapters of a step: 0, or `max_loras + 1` for any number. One number
more stands for steps whose adapters have no such gate, plain ones above all: their graphs sum
nothing. Where this is not known of an adapter, and on an engine whose graphs do not have the key,
the graph for any adapters is taken, which is right for every step.

All ranks must take the same graph. They do: they hold the same adapters, and are asked about those
of the scheduler's step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from vllm_lora_ext.model_patches.rows import RUNNERS, wrap_once


class Engine(Protocol):
    """The manager of an engine's layers."""

    punica_wrapper_mapping: dict[str, Any]

    def sums(self, lora_ids: Iterator[int]) -> bool:
        """Whether a gate of these adapters reads a sum over the ranks."""


_capturing: WeakSet[Engine] = WeakSet()
_engines: WeakValueDictionary[int, Engine] = WeakValueDictionary()  # by the LoRA config's id


def no_sums(lora_config: Any) -> int:
    """The key of graphs for steps whose gates read no sums: vLLM's own end one below."""
    case: int = lora_config.max_loras + 2
    return case


def capture_apart(engine: Engine, vllm_config: Any) -> None:
    """To be called for an engine that captures graphs and has layers that may sum, before it
    chooses what to capture."""
    _capturing.add(engine)
    wrap_once(LoRAModelRunnerMixin, maybe_select_dummy_loras=_tell_capture)
    lora_config = vllm_config.lora_config
    specialise = vllm_config.compilation_config.cudagraph_specialize_lora
    if not specialise or lora_config.specialize_active_lora:  # the numbers mean something else
        return
    _engines[id(lora_config)] = engine
    wrap_once(CudagraphDispatcher, _get_lora_cases=_more_cases_v1,
              initialize_cudagraph_keys=_tell_apart_v1)  # fmt: skip
    v1, v2 = (sys.modules.get(name) for name in RUNNERS)  # a worker imports the one it uses
    if v1 is not None:
        wrap_once(v1.GPUModelRunner, _determine_batch_execution_and_padding=_count_v1)
    if v2 is not None:
        wrap_once(v2, get_num_active_loras_for_dispatch=_count_v2)
        wrap_once(v2.ModelCudaGraphManager, __init__=_more_cases_v2)


def _tell_capture(stock: Any) -> Any:
    signature = inspect.signature(stock)

    @contextmanager
    def maybe_select_dummy_loras(
        self: Any, lora_config: Any, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        given = signature.bind(self, lora_config, *args, **kwargs).arguments
        num_active_loras = given.get("num_active_loras", 0)
        with stock(self, lora_config, *args, **kwargs):
            manager: Any = getattr(getattr(self, "lora_manager", None), "_adapter_manager", None)
            if manager in _capturing:
                for wrapper in manager.punica_wrapper_mapping.values():
                    wrapper.step_map.frozen = num_active_loras != no_sums(lora_config)
            yield

    return maybe_select_dummy_loras


def _more_cases_v1(stock: Any) -> Any:
    def _get_lora_cases(self: Any) -> list[int]:
        lora_config, cases = self.vllm_config.lora_config, stock(self)
        return [*cases, no_sums(lora_config)] if id(lora_config) in _engines else cases

    return _get_lora_cases


def _tell_apart_v1(stock: Any) -> Any:
    """Stock's dispatcher takes every number for the largest, unless it was told to look."""

    def initialize_cudagraph_keys(self: Any, *args: Any, **kwargs: Any) -> None:
        ours = id(self.vllm_config.lora_config) in _engines
        if ours:  # done before, for another mode
            self.specialize_lora_count = False
        stock(self, *args, **kwargs)
        if ours:
            self.specialize_lora_count = True

    return initialize_cudagraph_keys


def _count_v1(stock: Any) -> Any:
    def _determine_batch_execution_and_padding(
        self: Any, *args: Any, force_num_active_loras: int | None = None, **kwargs: Any
    ) -> Any:
        if force_num_active_loras is None:
            ids = self.input_batch.lora_id_to_lora_request
            force_num_active_loras = _counted(self.lora_config, len(ids), lambda: iter(ids))
        return stock(self, *args, force_num_active_loras=force_num_active_loras, **kwargs)

    return _determine_batch_execution_and_padding


def _count_v2(stock: Any) -> Any:
    def get_num_active_loras_for_dispatch(
        lora_config: Any, lora_state: Any, req_ids: list[str], dummy_run: bool
    ) -> int:
        number: int = stock(lora_config, lora_state, req_ids, dummy_run)
        if dummy_run:
            return number
        requests = lora_state.get_activate_loras
        return _counted(lora_config, number, lambda: (r.lora_int_id for r in requests(req_ids)))

    return get_num_active_loras_for_dispatch


def _counted(lora_config: Any, number: int, ids: Callable[[], Iterator[int]]) -> int:
    """The number by which the graph of a step with so many adapters is found."""
    engine = _engines.get(id(lora_config)) if number else None
    return number if engine is None or engine.sums(ids()) else no_sums(lora_config)


def _more_cases_v2(stock: Any) -> Any:
    def __init__(
        self: Any, vllm_config: Any, *args: Any, lora_capture_cases: Any = None, **kwargs: Any
    ) -> None:
        if id(vllm_config.lora_config) in _engines and lora_capture_cases:
            lora_capture_cases = [*lora_capture_cases, no_sums(vllm_config.lora_config)]
        stock(self, vllm_config, *args, lora_capture_cases=lora_capture_cases, **kwargs)

    return __init__


def apply() -> None:
    """Nothing at start: an engine's LoRA manager wraps when it is made."""
