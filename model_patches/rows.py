"""Which rows of a step belong to which request and position, on both of vLLM's model runners.

Targets, V1 and V2: `Worker.execute_model`, which the scheduler's output of every real step goes
through (a dummy run does not), and `LoRAModelRunnerMixin._set_active_loras`, after which every
adapter of the step has its slot. The order of the rows comes from `set_active_loras` (V1) and
`prepare_inputs` (V2); which rows' logits are computed from `_prepare_inputs` and
`_get_prompt_logprobs_dict` (V1) and `sample_tokens` (V2).

All that is known of a request comes from its `NewRequestData`, which V2 sends again when a request
goes on after a preemption, and V1 does not. A worker's methods are wrapped once in a process, when
an engine's layers or its recorder first ask for rows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_wrapped: set[tuple[Any, str, Any]] = set()


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start:stop` of a step: positions `at`, `at + 1`, ... of one request.

    The rows of drafts are among them; where an engine schedules speculation ahead of its results,
    `at` is then an upper bound. No span holds the rows that pad a step to the size of a graph.

    Attributes:
        request: as the scheduler sent it: ids or embeddings of the prompt, multimodal inputs,
            parameters (`sampling_params.extra_args`, or of a pooling request
            `pooling_params.extra_kwargs`), adapter.
        slot: of the request's adapter; -1: the base model.
        first: whether no step before has computed rows of the request; what the prefix cache gave
            does not count, and a request that goes on after a preemption has no first step again.
    """

    request: NewRequestData
    start: int
    stop: int
    at: int
    slot: int
    first: bool


class Rows:
    """Of one engine; its adapter manager holds it as `rows`.

    Args:
        manager: its `lora_index_to_id` says which adapter is in which slot.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._watches: list[Watch] = []
        self.instruction: Any = None  # `instruction.InstructionPass`, from the first on
        self.in_first_pass = False  # of two in a step (`two_pass`)
        self._order: tuple[Sequence[str], Sequence[int]] | None = None
        self._sampled_N: torch.Tensor | None = None
        self._hidden_TK: torch.Tensor | None = None

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Inside, what the model computes is not what the step's requests get."""
        self.in_first_pass = True
        try:
            yield
        finally:
            self.in_first_pass = False

    def watch(
        self,
        wants: Callable[[NewRequestData], bool],
        take: Callable[[Sequence[Span]], None],
    ) -> Watch:
        """Has `take` called in every step that computes rows of a request that is wanted.

        Args:
            wants: asked once for each `NewRequestData`: whether the request's rows are wanted.
            take: gets the spans in the order of their rows, before the model runs and when the
                adapters have their slots; and an empty sequence when the step is over.
        """
        self._watches.append(Watch(wants, take))
        wrap_runners()
        return self._watches[-1]

    def logits_rows(self, x_NK: torch.Tensor) -> torch.Tensor | slice:
        """Which rows of the step `x_NK` holds: the input of the layer that computes the logits.

        It is a selection (the rows to sample from) or, for `prompt_logprobs`, a slice of the hidden
        states of the whole step. In a dummy run there is no step: the first rows.

        Returns:
            int [N] on the device, or a slice of N rows. No host sync.
        Raises:
            RuntimeError: `x_NK` is neither.
        """
        hidden_TK, sampled_N = self._hidden_TK, self._sampled_N
        if hidden_TK is not None and _same_memory(x_NK, hidden_TK):
            start = (x_NK.storage_offset() - hidden_TK.storage_offset()) // hidden_TK.stride(0)
            return slice(start, start + len(x_NK))
        if sampled_N is None and hidden_TK is None:
            return slice(0, len(x_NK))
        if sampled_N is None or len(sampled_N) != len(x_NK):
            raise RuntimeError(f"logits of {len(x_NK)} rows that are not known to be of this step")
        return sampled_N

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """A step begins; until `end_step`, dummy runs aside, all rows are this step's."""
        for watch in self._watches:
            watch.begin(scheduled)

    def take_order(self, keys: Sequence[str], counts: Sequence[int]) -> None:
        """The step's requests in the order of their rows, and how many rows each has."""
        if self._watches:
            self._order = keys, counts

    def slots_are_set(self) -> None:
        """Every adapter of the step has its slot. Nothing to tell in a dummy run."""
        if self._order is not None:
            for watch in self._watches:
                watch.tell(*self._order, self._manager.lora_index_to_id)
            self._order = None

    def end_step(self) -> None:
        """The model has run, or failed."""
        self._order = self._sampled_N = None
        for watch in self._watches:
            watch.end()

    def take_sampled(self, index_N: torch.Tensor) -> None:
        """Which rows' logits are computed in this step: int [N] on the device."""
        self._sampled_N = index_N

    @contextmanager
    def logits_of(
        self, hidden_TK: torch.Tensor | None, index_N: torch.Tensor | None
    ) -> Iterator[None]:
        """Inside, logits are computed of slices of `hidden_TK`, or of its rows `index_N`."""
        self._hidden_TK, self._sampled_N = hidden_TK, index_N
        try:
            yield
        finally:
            self._hidden_TK = self._sampled_N = None


class Watch:
    """What one caller of `Rows.watch` wants, between steps and in one."""

    def __init__(
        self,
        wants: Callable[[NewRequestData], bool],
        take: Callable[[Sequence[Span]], None],
    ) -> None:
        self._wants, self._take = wants, take
        self._running: dict[str, NewRequestData] = {}  # wanted, and not finished
        self._new: set[str] = set()  # those of them that no step has computed yet
        self._at: dict[str, int] = {}  # first position in this step
        self._told = False

    @property
    def scheduled(self) -> bool:
        """Whether the step that has begun computes rows that are wanted."""
        return bool(self._at)

    def knows(self, key: str) -> bool:
        """Whether a request is wanted, and not finished."""
        return key in self._running

    def begin(self, scheduled: SchedulerOutput) -> None:
        # First: the id of an aborted request may come back as a new one in the same step.
        for key in scheduled.finished_req_ids:
            self._forget(key)
        cached = scheduled.scheduled_cached_reqs
        self._at = {}
        if self._running:
            at = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            self._at = {key: position for key, position in at if key in self._running}
        for request in scheduled.scheduled_new_reqs:
            key = request.req_id
            if not self._wants(request):
                self._forget(key)
                continue
            if key not in self._running:
                self._new.add(key)
            self._running[key] = request
            self._at[key] = request.num_computed_tokens

    def tell(self, keys: Sequence[str], counts: Sequence[int], slots: Sequence[int | None]) -> None:
        if not self._at:
            return
        stops = np.cumsum(counts).tolist()
        spans = [
            self._span(key, stop - int(count), stop, slots)
            for key, count, stop in zip(keys, counts, stops, strict=True)
            if key in self._at
        ]
        if spans:
            self._told = True
            self._take(spans)

    def end(self) -> None:
        self._at = {}
        if self._told:
            self._told = False
            self._take(())

    def _forget(self, key: str) -> None:
        self._running.pop(key, None)
        self._new.discard(key)

    def _span(self, key: str, start: int, stop: int, slots: Sequence[int | None]) -> Span:
        request, first = self._running[key], key in self._new
        self._new.discard(key)
        lora = request.lora_request
        slot = -1 if lora is None else slots.index(lora.lora_int_id)
        return Span(request, start, stop, self._at[key], slot, first)


def unknown_rows(vllm_config: Any) -> str | None:
    """What about an engine keeps its rows from being known on the host, if anything does."""
    speculative = vllm_config.speculative_config
    if getattr(speculative, "enable_adaptive_verification", False):
        return "adaptive verification of drafts, which sizes requests on the device"
    if vllm_config.parallel_config.use_ubatching:
        return "dual batch overlap, whose second half counts its rows anew"
    return None


def wrap_runners() -> None:
    """Has the runners of this process tell their engines' `Rows`; once."""
    # Here, not above: the front end's process has no worker, and this import is a large one.
    from vllm.v1.worker.gpu_worker import Worker

    wrap_once(Worker, execute_model=_tell_steps)
    wrap_once(LoRAModelRunnerMixin, set_active_loras=_tell_order_v1, _set_active_loras=_tell_slots)
    v1, v2 = (sys.modules.get(name) for name in RUNNERS)  # a worker imports the one that it uses
    if v1 is not None:
        wrap_once(v1.GPUModelRunner, _prepare_inputs=_tell_sampled_v1,
              _get_prompt_logprobs_dict=_tell_prompt_v1)  # fmt: skip
    if v2 is not None:
        wrap_once(v2.GPUModelRunner, prepare_inputs=_tell_order_v2, sample_tokens=_tell_logits_v2)


def wrap_once(owner: Any, **wrappers: Callable[[Any], Any]) -> None:
    """Puts `wrapper(stock)` in the place of each named attribute of a class or module, if this
    wrapper does not stand there already in this process."""
    for name, wrapper in wrappers.items():
        if (owner, name, wrapper) not in _wrapped:
            _wrapped.add((owner, name, wrapper))
            stock = getattr(owner, name)
            setattr(owner, name, functools.wraps(stock)(wrapper(stock)))


def _rows_of(runner: Any) -> Rows | None:
    """None in an engine beside this one that has no LoRA, or stock's manager."""
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    return getattr(manager, "rows", None)


def _same_memory(x: torch.Tensor, whole: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _tell_steps(stock: Any) -> Any:
    def execute_model(self: Any, scheduler_output: SchedulerOutput) -> Any:
        rows = _rows_of(self.model_runner)
        if rows is None:
            return stock(self, scheduler_output)
        rows.begin_step(scheduler_output)
        try:
            return stock(self, scheduler_output)
        finally:
            rows.end_step()

    return execute_model


def _tell_slots(stock: Any) -> Any:
    def _set_active_loras(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        rows = _rows_of(self)
        if rows is not None:
            rows.slots_are_set()

    return _set_active_loras


def _tell_order_v1(stock: Any) -> Any:
    def set_active_loras(self: Any, input_batch: Any, counts: Any, *args: Any, **kw: Any) -> Any:
        rows = _rows_of(self)
        if rows is not None:
            rows.take_order(input_batch.req_ids, counts)
        return stock(self, input_batch, counts, *args, **kw)

    return set_active_loras


def _tell_sampled_v1(stock: Any) -> Any:
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = stock(self, *args, **kwargs)
        rows = _rows_of(self)
        if rows is not None:
            rows.take_sampled(prepared[0])
        return prepared

    return _prepare_inputs


def _tell_prompt_v1(stock: Any) -> Any:
    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, counts: Any) -> Any:
        rows = _rows_of(self)
        if rows is None:
            return stock(self, hidden_states, counts)
        with rows.logits_of(hidden_states, None):
            return stock(self, hidden_states, counts)

    return _get_prompt_logprobs_dict


def _tell_order_v2(stock: Any) -> Any:
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(self, *args, **kwargs)
        rows = _rows_of(self)
        if rows is not None:
            rows.take_order(batch.req_ids, batch.num_scheduled_tokens)
        return batch

    return prepare_inputs


def _tell_logits_v2(stock: Any) -> Any:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        rows, state = _rows_of(self), self.execute_model_state
        if rows is None or state is None:
            return stock(self, grammar_output)
        with rows.logits_of(state.hidden_states, state.input_batch.logits_indices):
            return stock(self, grammar_output)

    return sample_tokens


def apply() -> None:
    """Nothing at start: an engine's LoRA manager wraps when it is made."""
