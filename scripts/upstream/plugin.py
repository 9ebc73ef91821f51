"""pytest plugin for vLLM's own LoRA tests: our classes in the place of stock's.

Loaded with `-p upstream_plugin` before any test module imports a name (`scripts/test_upstream.py`).
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from typing import Any

import pytest


def pytest_configure(config: Any) -> None:
    from vllm_lora_ext.plugin import register

    register()
    import vllm.lora.punica_wrapper as wrappers
    import vllm.lora.utils as utils
    from vllm.lora import model_manager

    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches.backend import Building, build_with

    # These tests build layers by themselves, where an engine's manager would.
    wrappers.get_punica_wrapper = model_manager.get_punica_wrapper
    backend = choice.without_triton("cpu")
    config.lora_ext = build_with(Building(router_rows=16, backend=backend, graphs=False))
    config.lora_ext.__enter__()  # to the end: a context that nobody holds ends at once

    stock = {_stock_of(cls): cls for cls in utils._all_lora_classes}
    stock |= _managers()
    stock = {old: new for old, new in stock.items() if old is not new}
    for name, module in list(sys.modules.items()):
        # Not where stock's own classes find each other: a subclass must not become its own base.
        if name.startswith("vllm.lora") and name != "vllm.lora.utils":
            for attribute, value in list(vars(module).items()):
                if isinstance(value, type) and value in stock:
                    setattr(module, attribute, stock[value])


def _stock_of(cls: type) -> type:
    """The class of vLLM's that `cls` stands for."""
    return next(c for c in cls.__mro__ if c.__module__.startswith("vllm.lora"))


def _managers() -> dict[type, type]:
    from vllm.lora import model_manager, worker_manager
    from vllm.v1.worker import lora_model_runner_mixin

    ours: Any = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    return {
        model_manager.LRUCacheLoRAModelManager: ours._manager_cls,
        worker_manager.LRUCacheWorkerLoRAManager: ours,
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Known exceptions are still run: one that passes is no exception any more."""
    known = json.loads(os.environ["UPSTREAM_EXCEPTIONS"])
    for item in items:
        for pattern, reason in known.items():
            if fnmatch.fnmatch(item.nodeid, pattern):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
