"""`inspect`'s memory of a slot is what a model's layers really allocate for one slot more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests.kernels.test_memory import allocated
from tests.make_adapters import FIXTURES
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.summary import slot_bytes


@pytest.mark.parametrize("name", ["plain-a", "loramoe-a", "smora-a"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_of_a_model(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, on_cpu: bool
) -> None:
    """With the kernels' tables, as on a GPU, and without, as on a CPU."""
    if not on_cpu:
        manager = "vllm_lora_ext.model_patches.manager"
        monkeypatch.setattr(f"{manager}.choose_backend", lambda *_: choice.triton())
        monkeypatch.setattr(f"{manager}.RoutedLoRAModelManager._warm", lambda *_: None)
    folder = FIXTURES / "routed" / name / "adapter"
    seen = []
    for slots in (2, 5):
        dtype = "float32" if on_cpu else "bfloat16"
        h = harness(max_loras=slots, max_cpu_loras=5, dtype=dtype)
        h.worker.load(LoRARequest(name, 1, str(folder)), None, ())
        host, layers = h.worker._residency.get(1).host, h.manager.modules
        sites = [layers[n].site for n in host.sites]
        seen.append(sum(map(allocated, dict.fromkeys(sites))))
    want = slot_bytes(load_adapter(folder), 64, on_cpu)
    assert (seen[1] - seen[0]) / 3 == want
