"""The worker's manager: reads and checks an adapter before anything of it reaches a slot.

Target: the name `LRUCacheWorkerLoRAManager` in `vllm.v1.worker.lora_model_runner_mixin`, from which
both model runners take their manager.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import vllm.v1.worker.lora_model_runner_mixin as runner_mixin
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_lora_ext.adapters.folder import resolve_inside
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.manager import RoutedLoRAModel, RoutedLoRAModelManager
from vllm_lora_ext.settings import LoraExtSettings


class RoutedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads any adapter format that has a reader."""

    _manager_cls = RoutedLoRAModelManager
    _adapter_manager: RoutedLoRAModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.settings = LoraExtSettings.from_additional_config(vllm_config.additional_config)
        self._evicted = _HostCache(self.settings.host_cache_mb << 20)
        self._in_step = False

    def _load_adapter(self, lora_request: LoRARequest) -> RoutedLoRAModel:
        kept = self._evicted.get(lora_request) if self._in_step else None
        return kept or self._read(lora_request)

    def _read(self, request: LoRARequest) -> RoutedLoRAModel:
        path, roots = shortest(request.lora_path), self.settings.readable_roots()
        adapter = load_adapter(find_folder(path, roots), **self.settings.reading())
        model = self._adapter_manager.model_of(request.lora_int_id, adapter)
        self._evicted.put(request, model)
        return model

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        if not lora_requests:
            return
        # An adapter that vLLM's cache evicted is read again in the middle of a step, where a file
        # that has changed since would end the engine: take the copy that was checked.
        self._in_step = True
        # `load_inplace` was done when the request was admitted; stock repeats it every step.
        once = {msgspec.structs.replace(r, load_inplace=False) for r in lora_requests if r}
        try:
            super()._apply_adapters(once)
        finally:
            self._in_step = False

    def remove_adapter(self, adapter_id: int) -> bool:
        self._evicted.drop(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        """Also what vLLM calls when it has replaced the base weights."""
        self._evicted.clear()
        super().remove_all_adapters()
        self._adapter_manager.follow_base()


def shortest(path: str) -> str:
    """`path` without trailing `/` and `/.`, which `http` adds to tell two loads apart."""
    return re.sub(r"(/\.?)+$", "", path) or path


def find_folder(path: str, roots: Sequence[Path] | None) -> str:
    """The adapter's folder. Raises AdapterError `not_found`, `path_not_allowed`."""
    return _anywhere(path) if roots is None else _below(path, roots)


def _anywhere(path: str) -> str:
    """Where stock looks: the file system, then the Hugging Face hub."""
    try:
        return get_adapter_absolute_path(path)
    except Exception as error:  # no network, offline mode: stock lets some of them through
        raise AdapterError(
            "not_found", "there is no such adapter folder, and none came from the hub",
            seen=path, fix="check the path of the adapter",
        ) from error  # fmt: skip


def _below(path: str, roots: Sequence[Path]) -> str:
    """The folder below one of `roots`; a relative path may also start at the working directory.

    The hub is never asked: its cache is not below the roots.
    """
    path = os.path.expanduser(path)
    places = [os.path.join(root, path) for root in roots] + [os.path.abspath(path)]
    found = next((place for place in places if os.path.isdir(place)), places[0])
    return str(resolve_inside(found, roots))


class _HostCache:
    """Checked adapters by id, least recently used out first, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._models: OrderedDict[int, tuple[LoRARequest, RoutedLoRAModel, int]] = OrderedDict()

    def get(self, request: LoRARequest) -> RoutedLoRAModel | None:
        found = self._models.get(request.lora_int_id)
        if found is None or found[0] != request or found[0].lora_path != request.lora_path:
            return None
        self._models.move_to_end(request.lora_int_id)
        return found[1]

    def put(self, request: LoRARequest, model: RoutedLoRAModel) -> None:
        self.drop(request.lora_int_id)
        size = _bytes(model.adapter)
        self._models[request.lora_int_id] = (request, model, size)
        self._bytes += size
        while self._bytes > self._limit and self._models:
            self.drop(next(iter(self._models)))

    def drop(self, adapter_id: int) -> None:
        self._bytes -= self._models.pop(adapter_id, (None, None, 0))[2]

    def clear(self) -> None:
        self._models.clear()
        self._bytes = 0


def _bytes(adapter: RoutedAdapter) -> int:
    blocks = adapter.blocks.values()
    owners = [*adapter.modules.values(), *blocks, *(p for b in blocks for p in b.parts.values())]
    tensors = (value for owner in owners for value in vars(owner).values())
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def apply() -> None:
    """Both runners build this manager from now on."""
    runner_mixin.LRUCacheWorkerLoRAManager = RoutedWorkerLoRAManager
