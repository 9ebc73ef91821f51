"""pytest plugin for vLLM's own LoRA tests: our classes in the place of stock's.

Loaded with `-p upstream_plugin` before any test module imports a name (`scripts/test_upstream.py`).
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import sys
from typing import Any

import pytest


def pytest_configure(config: Any) -> None:
    from vllm_lora_ext.plugin import register

    register()
    import vllm.lora.utils as utils

    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches.backend import Building, build_with

    # These tests build layers by themselves, where an engine's manager would.
    backend = choice.without_triton("cpu")
    config.lora_ext = build_with(Building(router_rows=16, backend=backend, graphs=False))
    config.lora_ext.__enter__()  # to the end: a context that nobody holds ends at once

    _cpu()
    stock = {_stock_of(cls): cls for cls in utils._all_lora_classes}
    stock |= _fully_sharded(stock) | _logits() | _managers() | _step_metadata()
    stock = {old: new for old, new in stock.items() if old is not new}
    for name, module in list(sys.modules.items()):
        # Not where stock's own classes find each other: a subclass must not become its own base.
        if name.startswith("vllm.lora") and name != "vllm.lora.utils":
            for attribute, value in list(vars(module).items()):
                if isinstance(value, type) and value in stock:
                    setattr(module, attribute, stock[value])


def _cpu() -> None:
    """What these tests, written for GPUs, leave out or name otherwise."""
    import torch
    import vllm.v1.worker.gpu_worker as gpu_worker
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        # Layers get it from vLLM's weight loader, which layers made by hand never see.
        for layer in (LinearBase, VocabParallelEmbedding):
            layer.cpu_linear = staticmethod(torch.nn.functional.linear)
        gpu_worker.Worker = CPUWorker


def _stock_of(cls: type) -> type:
    """The class of vLLM's that `cls` stands for."""
    return next(c for c in cls.__mro__ if c.__module__.startswith("vllm.lora"))


def _fully_sharded(ours: dict[type, type]) -> dict[type, type]:
    """Ours stand for stock's classes of fully sharded LoRA, too."""
    from vllm.lora import layers

    names = [name for name in layers.__all__ if name.endswith("WithShardedLoRA")]
    plain_of = {name: name.replace("Sharded", "") for name in names}
    return {getattr(layers, name): ours[getattr(layers, of)] for name, of in plain_of.items()}


def _logits() -> dict[type, type]:
    import torch
    from vllm.lora.layers import LogitsProcessorWithLoRA

    from vllm_lora_ext.model_patches.logits import RoutedLogits

    class Rows:
        """An engine's runner says which rows have logits; here all of the step's have."""

        def logits_rows(self, x_NK: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(x_NK), device=x_NK.device)

    unfollowed: Any = RoutedLogits
    unfollowed.rows = Rows()
    return {LogitsProcessorWithLoRA: RoutedLogits}


def _managers() -> dict[type, type]:
    from vllm.lora import model_manager, worker_manager
    from vllm.v1.worker import lora_model_runner_mixin

    ours: Any = lora_model_runner_mixin.LRUCacheWorkerLoRAManager

    class Manager(ours._manager_cls):  # type: ignore[misc, name-defined]
        """Some tests make it without a model's configuration, which an engine always has."""

        def __init__(self, *args: Any, vllm_config: Any = None, **kwargs: Any) -> None:
            if vllm_config is not None and vllm_config.model_config is None:
                from vllm.config import ModelConfig

                vllm_config = copy.copy(vllm_config)
                vllm_config.model_config = ModelConfig(max_model_len=16)
            super().__init__(*args, vllm_config=vllm_config, **kwargs)
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.stock_reads = True  # these tests do

    return {
        model_manager.LRUCacheLoRAModelManager: Manager,
        worker_manager.LRUCacheWorkerLoRAManager: ours,
    }


def _step_metadata() -> dict[type, type]:
    import vllm.lora.punica_wrapper as wrappers
    from vllm.lora import model_manager
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_lora_ext.model_patches.punica import _with_step

    stock: Any = resolve_obj_by_qualname(current_platform.get_punica_wrapper())
    ours = _with_step(stock)
    wrappers.get_punica_wrapper = model_manager.get_punica_wrapper = ours
    return {stock: ours}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Known exceptions are still run: one that passes is none any more, and an error."""
    known = json.loads(os.environ["UPSTREAM_EXCEPTIONS"])
    for item in items:
        for pattern, reason in known.items():
            if fnmatch.fnmatch(item.nodeid, pattern):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """On a CPU, model runner V2, which a fixture asks for, needs Triton's backend for CPUs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
