"""What the gates of a request decided, kept in the worker's process while it runs.

Target: `Worker`, which gets one more method to ask for a trace. `Recorder` is made by the adapter
manager only when the setting `trace` is on: without it nothing here runs. `rows` says which rows of
a step belong to a traced request; the gates come from the hooks that the layers' sites have anyway,
run after their ops with the ops' own input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.sched.output import NewRequestData

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.plan import SlicePlan, SlotPlan
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.residency import HostAdapter
from vllm_lora_ext.model_patches.rows import Span
from vllm_lora_ext.routing.mix import expert_weights
from vllm_lora_ext.trace.fetch import OWNER, RPC, wanted
from vllm_lora_ext.trace.gates import expert_gates
from vllm_lora_ext.trace.load import ExpertLoad
from vllm_lora_ext.trace.store import TraceStore


@dataclass(frozen=True)
class Traced:
    """Rows of one traced request, and the adapter in their slot; None: the base model."""

    span: Span
    host: HostAdapter | None

    @property
    def key(self) -> str:
        return self.span.request.req_id

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.span.start : self.span.stop]


class Recorder:
    """Keeps the gates of the requests that ask for them.

    Args:
        manager: the `RoutedLoRAModelManager`, its layers and blocks in place.
    """

    def __init__(self, manager: Any) -> None:
        self.store, self.load = TraceStore(), ExpertLoad()
        self._manager = manager
        self._traced: list[Traced] = []
        for name, layer in manager.modules.items():
            if isinstance(layer, RoutedLinear):
                self._watch(layer.site, layer.reduces, functools.partial(self._keep_linear, name))
        for name, block in manager.blocks.items():
            self._watch(block.first.site, False, functools.partial(self._keep_block, name))
        manager.model.register_forward_pre_hook(self._keep_ids, with_kwargs=True)
        manager.rows.watch(self._wants, self._take)
        _add_rpc()

    def _wants(self, request: NewRequestData) -> bool:
        params = request.sampling_params
        if params is not None and wanted(params.extra_args):
            return True
        self.store.pass_by(request.req_id)
        return False

    def _take(self, spans: Sequence[Span]) -> None:
        self._traced = [self._trace(span) for span in spans]

    def _trace(self, span: Span) -> Traced:
        lora = span.request.lora_request
        host = None if lora is None else self._manager.list_adapters()[lora.lora_int_id].host
        if span.first:
            params = span.request.sampling_params
            said = (params and params.extra_args) or {}
            self.store.start(
                span.request.req_id, span.request.prompt_token_ids or [],
                lora.lora_name if lora else "", host.system if host else "",
                self._manager.base_name, said.get(OWNER, ""),
            )  # fmt: skip
        return Traced(span, host)

    def _watch(self, site: Site, reduces: bool, keep: Callable[..., None]) -> None:
        """Calls `keep(traced, x, u)` after the site's op, after what is called there already."""

        def then(_y: torch.Tensor, x: torch.Tensor, u: torch.Tensor | None) -> None:
            for traced in self._traced:
                if not reduces:
                    keep(traced, traced.of(x), None)
                elif u is not None:  # x is a shard; what gates read is the same on every rank
                    keep(traced, None, traced.of(u))

        site.listen(then)

    def _keep_linear(
        self, layer: str, traced: Traced, x_TK: torch.Tensor | None, u_TR: torch.Tensor | None
    ) -> None:
        site, slot = self._manager.modules[layer].site, traced.span.slot
        plan = site.plans[slot] if slot >= 0 else None
        if plan is None or plan.plain or traced.host is None:
            return
        if u_TR is None:
            assert x_TK is not None
            u_TR = plan.shrink(x_TK)
        given_TC = traced.of(site.step.rows_TC) if plan.columns else None
        parts = dict(zip(traced.host.names[layer], plan.slices, strict=False))
        for name, part in parts.items():  # slices of one name have one gate
            if part.gate.source != "none":
                self._put(traced, name, _gates(u_TR, plan, part, given_TC))

    def _keep_block(self, block: str, traced: Traced, x_TK: torch.Tensor, _u: None) -> None:
        found = None if traced.host is None else traced.host.blocks.get(block)
        if traced.host is not None and found is not None:
            router_GK = found.first.router_GK.to(x_TK.device)
            (name,) = traced.host.names[block]
            self._put(traced, name, expert_weights(found.gate, x_TK.float() @ router_GK.t()))

    def _put(self, traced: Traced, module: str, gates_TE: torch.Tensor) -> None:
        gates_TE = gates_TE.cpu()
        self.store.put_gates(traced.key, traced.span.at, module, gates_TE)
        self.load.add(traced.span.request.lora_request.lora_name, gates_TE)

    def _keep_ids(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids_T: Any = kwargs.get("input_ids", args[0] if args else None)
        for traced in self._traced if ids_T is not None else ():
            self.store.put_ids(traced.key, traced.span.at, traced.of(ids_T).cpu().clone())


def _gates(
    u_TR: torch.Tensor, plan: SlotPlan, part: SlicePlan, given_TC: torch.Tensor | None
) -> torch.Tensor:
    part = part.on(u_TR.device)
    u_TG = part.logits(u_TR, plan.stats_at, given_TC)
    head_T = u_TR[:, part.head_at] + part.head_bias if part.gate.threshold_head else None
    return expert_gates(part.gate, u_TG, part.bias_G, head_T)


def _add_rpc() -> None:
    """Once a process."""
    # Here, not above: the front end's process has no worker, and this import is a large one.
    from vllm.v1.worker.gpu_worker import Worker

    def lora_ext_trace(
        self: Any, request_id: str, prompt: int = 0, choice: int = 0, owner: str = ""
    ) -> str:
        """A trace as JSON, or the text of the error: a worker must not fail for a wrong id."""
        recorder = self.model_runner.lora_manager._adapter_manager.recorder
        try:
            return recorder.store.get(request_id, prompt, choice, owner).to_json()
        except AdapterError as error:
            return str(error)

    setattr(Worker, RPC, lora_ext_trace)


def apply() -> None:
    """Nothing at start: `Recorder` adds the method when an engine turns the setting on."""
