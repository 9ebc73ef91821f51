"""The worker's manager: reads and checks an adapter before anything of it reaches a slot.

Target: the name `LRUCacheWorkerLoRAManager` in `vllm.v1.worker.lora_model_runner_mixin`, from which
both model runners take their manager.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import vllm.v1.worker.lora_model_runner_mixin as runner_mixin
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_lora_ext.adapters.memory import MemorySource, load_memory_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.adapter_paths import find_folder
from vllm_lora_ext.model_patches.identity import tag_torch_caches
from vllm_lora_ext.model_patches.manager import RoutedLoRAModel, RoutedLoRAModelManager
from vllm_lora_ext.settings import LoraExtSettings


class RoutedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads any adapter format that has a reader."""

    _manager_cls = RoutedLoRAModelManager
    _adapter_manager: RoutedLoRAModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        tag_torch_caches()
        self.settings = LoraExtSettings.from_additional_config(vllm_config.additional_config)
        self._held = _HostCache(self.settings.host_cache_mb << 20)

    def load(
        self, request: LoRARequest, source: MemorySource | None, in_use: frozenset[int]
    ) -> LoadReport:
        """Has an adapter read, checked and kept, and puts it into a slot.

        Args:
            source: its tensors; None: they are in the folder at the request's path.
            in_use: adapters that must not be evicted for it.
        Raises:
            AdapterError: it cannot be served; what was held under its id still is.
        """
        lora_id = request.lora_int_id
        evicted: tuple[int, ...] = ()
        if source is not None or request.load_inplace or lora_id not in self._held.ids():
            model = self._adapter_manager.model_of(lora_id, self._read(request, source))
            evicted = self._held.put(lora_id, model, in_use)
            for other in (lora_id, *evicted):
                super().remove_adapter(other)
        super().add_adapter(msgspec.structs.replace(request, load_inplace=False))
        return dataclasses.replace(self._held.report(lora_id), evicted=evicted)

    def versions(self) -> dict[int, LoadReport]:
        """Everything that is held."""
        return {lora_id: self._held.report(lora_id) for lora_id in self._held.ids()}

    def _read(self, request: LoRARequest, source: MemorySource | None) -> RoutedAdapter:
        if source is not None:
            return load_memory_adapter(source)
        folder = find_folder(request.lora_path, self.settings.readable_roots())
        return load_adapter(folder, **self.settings.reading())

    def _load_adapter(self, lora_request: LoRARequest) -> RoutedLoRAModel:
        return self._held.get(lora_request.lora_int_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        self._held.drop(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        """Also what vLLM calls when it has replaced the base weights."""
        super().remove_all_adapters()
        self._adapter_manager.follow_base()


@dataclass(frozen=True)
class LoadReport:
    """What a worker holds of an adapter: plain values, they cross processes.

    Args:
        version: digest of its content.
        bytes: of host memory.
        evicted: ids of those that were dropped for it.
    """

    version: str
    bytes: int
    evicted: tuple[int, ...] = ()


class _HostCache:
    """Checked adapters by id, least recently used out first, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._models: OrderedDict[int, tuple[RoutedLoRAModel, int]] = OrderedDict()

    def ids(self) -> set[int]:
        return set(self._models)

    def get(self, lora_id: int) -> RoutedLoRAModel:
        self._models.move_to_end(lora_id)
        return self._models[lora_id][0]

    def report(self, lora_id: int) -> LoadReport:
        model, size = self._models[lora_id]
        return LoadReport(model.adapter.digest, size)

    def put(self, lora_id: int, model: RoutedLoRAModel, in_use: frozenset[int]) -> tuple[int, ...]:
        size, out = _bytes(model.adapter), []
        others = [i for i in self._models if i != lora_id]
        room = self._limit - size - sum(self._models[i][1] for i in others)
        for other in others:
            if room < 0 and other not in in_use:
                room += self._models[other][1]
                out.append(other)
        if room < 0:
            raise AdapterError(
                "host_cache_full", "the adapter does not fit beside those that are in use",
                seen=f"{size} bytes", limit=f"{self._limit} bytes", fix="raise host_cache_mb",
            )  # fmt: skip
        for other in out:
            self.drop(other)
        self.drop(lora_id)
        self._models[lora_id] = (model, size)
        return tuple(out)

    def drop(self, lora_id: int) -> None:
        self._models.pop(lora_id, None)


def _bytes(adapter: RoutedAdapter) -> int:
    blocks = adapter.blocks.values()
    owners = [*adapter.modules.values(), *blocks, *(p for b in blocks for p in b.parts.values())]
    tensors = (value for owner in owners for value in vars(owner).values())
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def apply() -> None:
    """Both runners build this manager from now on."""
    runner_mixin.LRUCacheWorkerLoRAManager = RoutedWorkerLoRAManager
