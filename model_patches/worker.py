"""The worker's manager: reads and checks an adapter before anything of it reaches a slot.

Target: the name `LRUCacheWorkerLoRAManager` in `vllm.v1.worker.lora_model_runner_mixin`, from which
both model runners take their manager.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection
from typing import Any

import vllm.v1.worker.lora_model_runner_mixin as runner_mixin
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_lora_ext.adapters.memory import MemorySource, load_memory_adapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.adapters.template import Template
from vllm_lora_ext.conditions.recipe import is_recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import foreign
from vllm_lora_ext.model_patches.adapter_paths import find_folder
from vllm_lora_ext.model_patches.agreement import with_ranks
from vllm_lora_ext.model_patches.deriving import Deriver
from vllm_lora_ext.model_patches.held import incomplete
from vllm_lora_ext.model_patches.identity import tag_torch_caches
from vllm_lora_ext.model_patches.loader import Loader, Reading
from vllm_lora_ext.model_patches.manager import (
    RoutedLoRAModel,
    RoutedLoRAModelManager,
    slots_pinned,
)
from vllm_lora_ext.model_patches.residency import (
    HostAdapter,
    LoadReport,
    Prepared,
    Residency,
    Resident,
)
from vllm_lora_ext.model_patches.sleep import kept_asleep
from vllm_lora_ext.model_patches.traffic import Stats, Traffic
from vllm_lora_ext.settings import LoraExtSettings

_LEAST = 2048 << 20  # bytes of host memory by default


class RoutedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads any adapter format that has a reader, and keeps what it has loaded.

    What is loaded stays in host memory (`Residency`) until it is removed or evicted by a load;
    vLLM's own cache, its slots and `remove_all_adapters` only decide what is where on top of that.
    """

    _manager_cls = RoutedLoRAModelManager
    _adapter_manager: RoutedLoRAModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        tag_torch_caches()
        self._head_size = vllm_config.model_config.get_head_size()
        self.settings = LoraExtSettings.from_additional_config(vllm_config.additional_config)
        self._loader = Loader(self._plan)
        self._traffic = Traffic()

    def create_lora_manager(self, model: Any, vllm_config: Any) -> Any:
        with kept_asleep(vllm_config):
            wrapped = super().create_lora_manager(model, vllm_config)
        limit = self.settings.host_cache_mb
        # By default never less than vLLM itself would hold.
        every = self._adapter_manager.slot_nbytes * self._adapter_manager.capacity
        self._residency = Residency(max(every, _LEAST) if limit is None else limit << 20)
        manager = self._adapter_manager
        self._deriver = Deriver(
            self._residency, manager.placer, manager.composer,
            lambda request: self._read(request, None), _resident,
        )  # fmt: skip
        return wrapped

    def load(
        self, request: LoRARequest, source: MemorySource | Prepared | None, in_use: Collection[int]
    ) -> LoadReport:
        """Loads an adapter into host memory, and into a slot when one is free.

        What is held under the id already is only reported, unless the request says `load_inplace`
        or brings a source.

        Args:
            source: its tensors; None: they are in the request's folder, or it is made of others as
                the request's recipe says; or what `prepare` got.
            in_use: ids that must stay in host memory; pinned ones do anyway.
        Raises:
            AdapterError: the adapter cannot be served, or `host_cache_full`; what was held under
                the id still is. `ranks_differ`: it needs what other ranks do not have.
                `adapter_changed`: a part is not what the recipe was made for.
        """
        held = self._residency.get(request.lora_int_id)
        modules = self._adapter_manager.modules
        if held is not None and source is None and not request.load_inplace:
            self.forget(request.lora_int_id)
            return with_ranks(lambda: held, modules).report()
        with gpu_sync_allowed():
            new = with_ranks(lambda: self._loader.take(request, source), modules)
            return self._hold(request.lora_int_id, new, in_use)

    def prepare(self, request: LoRARequest, source: MemorySource | None) -> None:
        """Begins to read, check and pack an adapter in a thread; `load` then takes the result."""
        self._loader.begin(request, source)

    def prepared(self, adapter_id: int) -> bool:
        """Whether `load` would find `prepare` done, well or not."""
        return self._loader.done(adapter_id)

    def forget(self, adapter_id: int) -> None:
        """Gives up what `prepare` began."""
        self._loader.forget(adapter_id)

    def _plan(self, request: LoRARequest, source: MemorySource | None) -> Reading:
        if source is None and is_recipe(request.lora_path):
            try:
                return self._deriver.plan(request)
            except AdapterError as error:
                return Reading(functools.partial(_fail, error))
        return Reading(functools.partial(self._read, request, source))

    def _read(self, request: LoRARequest, source: MemorySource | None) -> Resident:
        placer = self._adapter_manager.placer
        if source is not None:
            accepted = self.settings.accept_config_keys
            adapter = load_memory_adapter(
                source, accept_config_keys=accepted, head_size=self._head_size
            )
        elif foreign.is_foreign(request):
            return self._foreign(self._load_adapter(request))
        else:
            folder = find_folder(request.lora_path, self.settings.readable_roots())
            adapter = load_adapter(folder, **self.settings.reading(), head_size=self._head_size)
        return _resident(request.lora_int_id, placer.place(adapter))

    def _foreign(self, lora: LoRAModel) -> Resident:
        placer, max_rank = self._adapter_manager.placer, self.lora_config.max_lora_rank
        return _resident(lora.id, foreign.host_form(lora, placer, max_rank))

    def _hold(self, adapter_id: int, new: Resident, in_use: Collection[int]) -> LoadReport:
        manager = self._adapter_manager
        template = new.host.template if new.host is not None else None
        if template is not None and template.instruction:
            manager.expect_instructions(self._template)  # or the adapter is refused
        elif new.host is not None:  # here, and not where files are read: no step runs meanwhile
            manager.placer.reserve(new.host)
        stay = manager.pinned.union(in_use, self._loader.uses())
        evicted = self._residency.put(adapter_id, new, stay)
        for leaving in (*evicted, adapter_id):
            manager.remove_adapter(leaving)
        if template is not None:
            return new.report(evicted)  # no slot for it
        if new.host is not None and new.host.columns:
            manager.expect_columns()
        free = None in manager.lora_index_to_id and manager.has_slots({adapter_id})
        if manager.register(new.model, manager.active_ids()) and free:
            self._into_slot(adapter_id, new.nbytes)
        return new.report(evicted)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Stock's way to load: nothing that is in a slot leaves the host for it."""
        in_use = self._adapter_manager.active_ids()
        self.load(lora_request, None, {*in_use, lora_request.lora_int_id})
        return True

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """Before a step: its adapters into slots, from host memory only."""
        manager = self._adapter_manager
        needed = {request.lora_int_id for request in lora_requests if request}
        if not manager.has_slots(needed):
            raise slots_pinned(len(manager.pinned), manager.lora_slots)
        away = []
        for adapter_id in needed:  # first, so that none of them makes room for another
            manager.touch(adapter_id)
            if not manager.is_active(adapter_id):
                away.append(adapter_id)
        self._traffic.steps += bool(needed)
        for adapter_id in away:
            self._activate(adapter_id, needed)

    def _activate(self, adapter_id: int, needed: Collection[int]) -> None:
        manager = self._adapter_manager
        held = self._residency.get(adapter_id)
        if manager.get_adapter(adapter_id) is None:
            if held is None:
                raise AdapterError(
                    "not_found", "a step needs an adapter that is not loaded", seen=adapter_id,
                    fix="load it again",
                )  # fmt: skip
            if held.host is not None and held.host.template is not None:
                raise incomplete(f"with id {adapter_id}", held.host.understands)
            registered = manager.register(held.model, needed)
            assert registered, "vLLM's cache is at least as large as its slots"
        manager.make_slot(needed)
        self._into_slot(adapter_id, 0 if held is None else held.nbytes)

    def _into_slot(self, adapter_id: int, nbytes: int) -> None:
        began = time.perf_counter()
        if self._adapter_manager.activate_adapter(adapter_id):
            self._traffic.activations += 1
            self._traffic.bytes += nbytes
            self._traffic.seconds += time.perf_counter() - began

    def _template(self, adapter_id: int) -> Template | None:
        held = self._residency.get(adapter_id)
        return held.host.template if held is not None and held.host is not None else None

    def finish_gate(self, request_id: str) -> str | None:
        """As `InstructionPass.finish`; None before there is one."""
        found = self._adapter_manager.rows.instruction
        return None if found is None else found.finish(request_id)

    def stats(self) -> Stats:
        """What is in slots and in host memory, and what went into slots so far."""
        manager, host = self._adapter_manager, self._residency
        active = tuple(sorted(manager.active_ids()))
        experts = manager.recorder.load.sums() if manager.recorder else {}
        return Stats(active, manager.lora_slots, host.nbytes, host.limit, self._traffic, experts)

    def versions(self) -> dict[int, LoadReport]:
        """Everything that is held, by id."""
        return {i: held.report() for i, held in self._residency.all().items()}

    def list_adapters(self) -> set[int]:
        """Everything that is held, and a warm-up's dummies."""
        return super().list_adapters() | set(self._residency.all())

    def pinned_adapters(self) -> set[int]:
        """Ids that keep their slot."""
        return set(self._adapter_manager.pinned)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Keeps a loaded adapter in its slot and in host memory.

        Raises:
            AdapterError: `slots_pinned`; `not_found`.
        """
        if not self._adapter_manager.has_slots({adapter_id}):
            raise slots_pinned(len(self._adapter_manager.pinned), self._adapter_manager.lora_slots)
        if not self._adapter_manager.is_active(adapter_id):
            self._activate(adapter_id, {adapter_id})
        return super().pin_adapter(adapter_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Out of its slot and of host memory."""
        self._adapter_manager.pinned.discard(adapter_id)
        placed = super().remove_adapter(adapter_id)
        return self._residency.drop(adapter_id) or placed

    def remove_all_adapters(self) -> None:
        """Out of the slots: after a warm-up, an idle rank's dummy batch, or new base weights, none
        of which an adapter depends on. Host memory stays as it is."""
        super().remove_all_adapters()
        self._adapter_manager.follow_base()

    def base_replaced(self) -> None:
        """Base weights are new: what was computed from the old ones is not held any more."""
        for adapter_id, held in self._residency.all().items():
            if held.host is not None and held.host.on_base:
                self.remove_adapter(adapter_id)


def _resident(adapter_id: int, host: HostAdapter) -> Resident:
    return Resident(RoutedLoRAModel(adapter_id, host), host.version, host.nbytes, host.system)


def _fail(error: AdapterError) -> Resident:
    raise error


def apply() -> None:
    """Both runners build this manager from now on, and tell it of new base weights."""
    runner_mixin.LRUCacheWorkerLoRAManager = RoutedWorkerLoRAManager
    mixin = runner_mixin.LoRAModelRunnerMixin
    reset_lora_state = mixin.reset_lora_state
    if hasattr(reset_lora_state, "__wrapped__"):
        return

    @functools.wraps(reset_lora_state)
    def new_reset_lora_state(self: Any) -> None:
        reset_lora_state(self)
        if self.lora_config:
            self.lora_manager.base_replaced()

    mixin.reset_lora_state = new_reset_lora_state
