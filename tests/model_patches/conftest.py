"""The worker's side of vLLM's LoRA on a tiny model, without an engine: under a second each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.make_adapters import BASE_LLAMA, random_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native

OPTIONS: dict[str, Any] = {
    "model": str(BASE_LLAMA), "skip_tokenizer_init": True, "dtype": "float32",
    "enforce_eager": True, "enable_lora": True, "max_loras": 2,
    "max_cpu_loras": 2, "max_lora_rank": 64, "max_model_len": 64, "max_num_seqs": 4,
    "max_num_batched_tokens": 64, "block_size": 32, "seed": 0,
}  # fmt: skip


@dataclass
class Harness:
    """A worker's LoRA manager on a model of its own.

    Attributes:
        worker: what a model runner has as `lora_manager`.
        model: the model, its layers wrapped.
        runner: vLLM's own mixin around the worker's manager, as model runners have it.
    """

    worker: Any
    model: torch.nn.Module
    config: Any
    folder: Path
    runner: Any = field(init=False)

    def __post_init__(self) -> None:
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        self.runner = LoRAModelRunnerMixin()
        self.runner.lora_manager = self.worker
        self.runner.lora_config = self.config.lora_config
        self.runner.get_model = lambda: self.model

    @property
    def manager(self) -> Any:
        return self.worker._adapter_manager

    def save(self, name: str, adapter: RoutedAdapter) -> Any:
        """The adapter as a folder, and a request for it; ids count from 1."""
        from vllm.lora.request import LoRARequest

        path = self.folder / name
        write_native(adapter, path)
        number = sum(1 for _ in self.folder.iterdir())
        return LoRARequest(name, number, str(path))

    def random(self, name: str, **kwargs: Any) -> Any:
        """As `save`, of a random adapter for the model."""
        seed = sum(1 for _ in self.folder.iterdir())
        return self.save(name, random_adapter(self.config.model_config.hf_config, seed, **kwargs))

    def step(self, *requests: Any) -> None:
        """What a model runner does before a step of one row for each of the requests."""
        ids = tuple(r.lora_int_id if r else 0 for r in requests)
        self.runner._set_active_loras(ids, ids, {r for r in requests if r})

    def slot_of(self, request: Any) -> int:
        slot: int = self.manager.lora_index_to_id.index(request.lora_int_id)
        return slot

    def delta(self, layer: str, request: Any, x_TK: torch.Tensor) -> torch.Tensor:
        """What the adapter in its slot adds at a layer, [T, out], by the site's own kernels."""
        self.step(*[request] * len(x_TK))
        wrapped = self.manager.modules[layer]
        y_TN = x_TK.new_zeros(len(x_TK), sum(wrapped.output_slices))
        return wrapped._apply_lora_to_output(x_TK, y_TN)


@cache
def _start() -> None:
    """vLLM in this process: patched, its process group of one."""
    os.environ.update(
        VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    from vllm_lora_ext.plugin import register

    register()


@contextmanager
def _context(config: Any) -> Iterator[None]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = tempfile.mktemp(prefix="lora-ext-store-")
            parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        yield


def make_harness(
    folder: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    weights: bool = False,
    compilation: dict[str, Any] | None = None,
) -> Harness:
    """A harness whose adapters lie in `folder`.

    Args:
        weights: whether the model's are loaded.
        compilation: fields of that configuration as they are to be, whatever the platform makes of
            them, for a model that can run.
    """
    _start()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.worker import lora_model_runner_mixin

    additional = {"additional_config": {"lora_ext": settings}} if settings else {}
    config = EngineArgs(**(OPTIONS | options | additional)).create_engine_config()
    for name, value in (compilation or {}).items():
        setattr(config.compilation_config, name, value)
    with _context(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(config)
        if not weights:  # else they are whatever the memory holds
            for parameter in model.parameters():
                parameter.data.fill_(0.02)
        else:
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        if weights or compilation:
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        worker = lora_model_runner_mixin.LRUCacheWorkerLoRAManager(
            config, torch.device("cpu"), model.embedding_modules
        )
        model = worker.create_lora_manager(model, config)
    return Harness(worker, model, config, folder)


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., Harness]:
    """Makes harnesses: settings of the plugin, then vLLM's options by name."""
    folders = iter(range(100))

    def make(settings: dict[str, Any] | None = None, **options: Any) -> Harness:
        folder = tmp_path / f"adapters{next(folders)}"
        folder.mkdir()
        return make_harness(folder, settings or {}, options)

    return make


@pytest.fixture
def core() -> Any:
    """A `fake_core.Core` that can load three adapters."""
    from fake_core import Core

    return Core({"/a": "v1", "/b": "w1", "/c": "x1"})
