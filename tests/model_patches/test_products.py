"""A base layer's product on a CPU has one caller at a time: two would meet in its memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.make_adapters import BASE_LLAMA, normal
from tests.model_patches.conftest import make_harness

LAYER = "model.layers.0.mlp.down_proj"


def test_weights_are_read_between_steps(tmp_path: Path, monkeypatch: Any) -> None:
    """A thread reads the packed weights while steps run their products."""
    h = make_harness(tmp_path, {}, {"model": str(BASE_LLAMA)}, weights=True)
    from vllm_lora_ext.model_patches import dora

    layer = h.manager.modules[LAYER]
    method, inside, met = layer.base_layer.quant_method, threading.Lock(), []
    apply = method.apply

    def watched(*args: Any) -> torch.Tensor:
        met.append(not inside.acquire(blocking=False))
        time.sleep(0.001)  # a product that takes its time
        found: torch.Tensor = apply(*args)
        if not met[-1]:
            inside.release()
        return found

    want = torch.cat([columns for _, columns in dora._columns(layer)], dim=1).clone()
    x_TK = normal(np.random.default_rng(0), 5, want.shape[1])
    y_TN = apply(layer.base_layer, x_TK, None).clone()
    monkeypatch.setattr(method, "apply", watched)

    def product() -> None:
        wrong.append(not torch.equal(watched(layer.base_layer, x_TK, None), y_TN))

    read: list[bool] = []
    wrong: list[bool] = []

    def reading() -> None:
        while len(read) < 20 or (len(wrong) <= 3 and len(read) < 2000):  # steps came between
            found = torch.cat([columns for _, columns in dora._columns(layer)], dim=1)
            read.append(torch.equal(found, want))

    thread = threading.Thread(target=reading)
    steps = [_guarded(name) for name in ("execute_model", "sample_tokens", "execute_dummy_batch")]
    thread.start()
    count = 0
    while thread.is_alive():
        steps[count % 3](product)
        count += 1
    thread.join()
    assert len(read) >= 20 and all(read) and count > 3
    assert not any(met) and not any(wrong)


def _guarded(name: str) -> Any:
    """A step of vLLM's worker, as the manager has wrapped it, around something of our own."""
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_lora_ext.model_patches import products

    assert any(
        owner is Worker and named == name and wrapper is products._alone
        for owner, named, wrapper in products.wrap_once.__globals__["_wrapped"]
    ), "the steps of a worker hold the lock"
    return products._alone(lambda call: call())
