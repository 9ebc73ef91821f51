"""What the gates of a request decided, kept in the worker's process while it runs.

Targets: `Worker.execute_model`, `LoRAModelRunnerMixin.set_active_loras` (V1 runner) and
`GPUModelRunner.prepare_inputs` (V2 runner), which say which rows of a step belong to which request.
They are wrapped by `Recorder`, which the adapter manager makes only when the setting `trace` is on:
without it nothing here runs. The gates come from the hooks that the layers' sites have anyway, run
after their ops with the ops' own input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.site import SlicePlan
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.residency import HostAdapter
from vllm_lora_ext.routing.mix import expert_weights
from vllm_lora_ext.trace.fetch import RPC, wanted
from vllm_lora_ext.trace.gates import expert_gates
from vllm_lora_ext.trace.store import TraceStore

_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of a step: positions `at`, `at + 1`, ... of one traced request.

    `slot` is -1, and `host` None, for a request to the base model.
    """

    key: str
    start: int
    stop: int
    at: int
    slot: int
    host: HostAdapter | None


class Recorder:
    """Keeps the gates of the requests that ask for them.

    Args:
        manager: the `RoutedLoRAModelManager`, its layers and blocks in place.
    """

    def __init__(self, manager: Any) -> None:
        self.store = TraceStore()
        self._manager = manager
        self._lora_of: dict[str, int] = {}  # running traced requests; 0: the base model
        self._new: dict[str, Any] = {}  # those of them that no step has computed yet
        self._at: dict[str, int] = {}  # first position in this step, of those that are traced
        self._rows: tuple[Sequence[str], Sequence[int]] = ((), ())
        self._spans: list[Span] | None = []
        for name, layer in manager.modules.items():
            if isinstance(layer, RoutedLinear):
                self._watch(layer.site, layer.reduces, functools.partial(self._keep_linear, name))
        for name, block in manager.blocks.items():
            self._watch(block.first.site, False, functools.partial(self._keep_block, name))
        manager.model.register_forward_pre_hook(self._keep_ids, with_kwargs=True)
        _wrap_worker()

    def begin_step(self, scheduled: Any) -> None:
        """Takes the step's requests from vLLM's `SchedulerOutput`."""
        for key in scheduled.finished_req_ids:
            self._lora_of.pop(key, None)
            self._new.pop(key, None)
        cached = scheduled.scheduled_cached_reqs
        at = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            at[new.req_id] = new.num_computed_tokens
            if new.sampling_params is None or not wanted(new.sampling_params.extra_args):
                self.store.pass_by(new.req_id)
                continue
            if new.req_id not in self._lora_of:  # else it goes on after a preemption
                self._new[new.req_id] = new
            lora = new.lora_request
            self._lora_of[new.req_id] = 0 if lora is None else lora.lora_int_id
        self._at = {key: at[key] for key in scheduled.num_scheduled_tokens if key in self._lora_of}

    def take_rows(self, keys: Sequence[str], counts: Sequence[int]) -> None:
        """The requests in the order of their rows, and how many rows each has."""
        self._rows, self._spans = (keys, counts), None

    def end_step(self) -> None:
        self._at, self._rows, self._spans = {}, ((), ()), []

    @property
    def spans(self) -> list[Span]:
        """Of this step; made when the first layer asks, after the adapters have their slots."""
        if self._spans is None:
            self._spans, start = [], 0
            for key, count in zip(*self._rows, strict=False):
                stop = start + int(count)
                if key in self._at:
                    self._spans.append(self._span(key, start, stop))
                start = stop
        return self._spans

    def _span(self, key: str, start: int, stop: int) -> Span:
        lora_id, slot = self._lora_of[key], -1
        host: HostAdapter | None = None
        if lora_id:
            slot = self._manager.lora_index_to_id.index(lora_id)
            host = self._manager.list_adapters()[lora_id].host
        new = self._new.pop(key, None)
        if new is not None:
            self.store.start(
                key, new.prompt_token_ids or [], new.lora_request.lora_name if host else "",
                host.system if host else "", self._manager.base_name,
            )  # fmt: skip
        return Span(key, start, stop, self._at[key], slot, host)

    def _watch(self, site: Site, reduces: bool, keep: Callable[..., None]) -> None:
        """Calls `keep(span, x, u)` after the site's op, after what is called there already."""

        def then(_y: torch.Tensor, x: torch.Tensor, u: torch.Tensor | None) -> None:
            for span in self.spans:
                if not reduces:
                    keep(span, x[span.start : span.stop], None)
                elif u is not None:  # x is a shard; what gates read is the same on every rank
                    keep(span, None, u[span.start : span.stop])

        site.listen(then)

    def _keep_linear(
        self, layer: str, span: Span, x_TK: torch.Tensor | None, u_TR: torch.Tensor | None
    ) -> None:
        site = self._manager.modules[layer].site
        plan = site.plans[span.slot] if span.slot >= 0 else None
        if plan is None or plan.plain or span.host is None:
            return
        if u_TR is None:
            assert x_TK is not None
            u_TR = plan.shrink(x_TK)
        for name, part in zip(span.host.names[layer], plan.slices, strict=False):
            if part.gate.source != "none":
                self._put(span, name, _gates(u_TR, part))

    def _keep_block(self, block: str, span: Span, x_TK: torch.Tensor, _u: None) -> None:
        found = None if span.host is None else span.host.blocks.get(block)
        if span.host is not None and found is not None:
            router_GK = found.first.router_GK.to(x_TK.device)
            (name,) = span.host.names[block]
            self._put(span, name, expert_weights(found.gate, x_TK.float() @ router_GK.t()))

    def _put(self, span: Span, module: str, gates_TE: torch.Tensor) -> None:
        self.store.put_gates(span.key, span.at, module, gates_TE.cpu())

    def _keep_ids(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids_T: Any = kwargs.get("input_ids", args[0] if args else None)
        for span in self.spans if ids_T is not None else ():
            self.store.put_ids(span.key, span.at, ids_T[span.start : span.stop].cpu().clone())


def _gates(u_TR: torch.Tensor, part: SlicePlan) -> torch.Tensor:
    start = part.a_start if part.gate.source == "self" else part.router_start
    u_TG = u_TR[:, start : start + part.gate.num_gates]
    head_T = u_TR[:, part.head_at] + part.head_bias if part.gate.threshold_head else None
    return expert_gates(part.gate, u_TG, part.bias_G, head_T)


def check_settings(vllm_config: Any, graphs: bool) -> None:
    """Raises AdapterError `bad_settings` where an engine cannot keep traces."""
    for seen, limit, fix in (
        (graphs, "an engine without CUDA graphs, which do not run the recorder",
         "start with --enforce-eager"),
        (vllm_config.speculative_config is not None, "an engine without speculative decoding",
         "start without it"),
        (getattr(vllm_config.lora_config, "enable_tower_connector_lora", False),
         "an engine whose LoRA is on the language model only",
         "start without --enable-tower-connector-lora"),
    ):  # fmt: skip
        if seen:
            raise AdapterError(
                "bad_settings", "the setting trace is true, and this engine cannot keep traces",
                limit=limit, fix=f"{fix}, or leave the setting trace out",
            )  # fmt: skip


def _recorder_of(runner: Any) -> Recorder | None:
    manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
    return getattr(manager, "recorder", None)


def _wrap_worker() -> None:
    """Once a process; an engine beside this one that keeps no traces passes through."""
    # Here, not above: the front end's process has no worker, and this import is a large one.
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker, RPC):
        return
    execute_model, set_active_loras = Worker.execute_model, LoRAModelRunnerMixin.set_active_loras

    @functools.wraps(execute_model)
    def new_execute_model(self: Any, scheduler_output: Any) -> Any:
        recorder = _recorder_of(self.model_runner)
        if recorder is None:
            return execute_model(self, scheduler_output)
        recorder.begin_step(scheduler_output)
        try:
            return execute_model(self, scheduler_output)
        finally:
            recorder.end_step()

    @functools.wraps(set_active_loras)
    def new_set_active_loras(
        self: Any, input_batch: Any, counts: Any, *args: Any, **kw: Any
    ) -> Any:
        recorder = _recorder_of(self)
        if recorder is not None:
            recorder.take_rows(list(input_batch.req_ids), list(counts))
        return set_active_loras(self, input_batch, counts, *args, **kw)

    def lora_ext_trace(self: Any, request_id: str, prompt: int = 0, choice: int = 0) -> str:
        """A trace as JSON, or the text of the error: a worker must not fail for a wrong id."""
        recorder = _recorder_of(self.model_runner)
        assert recorder is not None, "asked only where the setting is on"
        try:
            return recorder.store.get(request_id, prompt, choice).to_json()
        except AdapterError as error:
            return str(error)

    Worker.execute_model = new_execute_model
    LoRAModelRunnerMixin.set_active_loras = new_set_active_loras
    setattr(Worker, RPC, lora_ext_trace)
    if _V2_RUNNER in sys.modules:  # imported by the worker that uses it, before its layers
        _wrap_v2_runner(sys.modules[_V2_RUNNER].GPUModelRunner)


def _wrap_v2_runner(cls: Any) -> None:
    prepare_inputs = cls.prepare_inputs

    @functools.wraps(prepare_inputs)
    def new_prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(self, *args, **kwargs)
        recorder = _recorder_of(self)
        if recorder is not None:
            recorder.take_rows(list(batch.req_ids), list(batch.num_scheduled_tokens))
        return batch

    cls.prepare_inputs = new_prepare_inputs


def apply() -> None:
    """Nothing at start: `Recorder` wraps when an engine turns the setting on."""
