"""What a step asks of the adapters' manager never makes the host wait for the device.

The manager is a worker's own, with the Triton backend; its layers' tensors have no memory and stand
for the device's (`tests.host_syncs`).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.host_syncs import host_syncs, page_locked  # noqa: F401

pytest.importorskip("triton")
DEVICE = torch.device("meta")


@pytest.fixture
def on_device(harness, page_locked, monkeypatch):  # noqa: F811
    """A harness whose LoRA layers stand on a device."""
    import vllm.lora.layers.base_linear as base_linear
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches import manager
    from vllm_lora_ext.plugin import register

    register()
    plain = mixin.LRUCacheWorkerLoRAManager
    monkeypatch.setattr(
        mixin,
        "LRUCacheWorkerLoRAManager",
        lambda config, _, modules: plain(config, DEVICE, modules),
    )
    monkeypatch.setattr(base_linear, "_get_lora_device", lambda _layer: DEVICE)
    monkeypatch.setattr(manager, "choose_backend", lambda *_: choice.triton())
    monkeypatch.setattr(manager.RoutedLoRAModelManager, "_warm", lambda *_: None)
    made = harness(max_loras=2, max_cpu_loras=4)
    made.manager.placer._pinned = True
    for wrapper in made.manager.punica_wrapper_mapping.values():
        step = wrapper.step_map
        assert step.tiled and len(step.rows_TC)
        step.device = SimpleNamespace(type="cuda")  # what decides where its copies come from
    return made


def test_steps_of_resident_adapters(on_device, page_locked) -> None:  # noqa: F811
    """Every mapping of rows, and adapters that go into slots and out of them."""
    made = on_device
    linears = [n for n, m in made.manager.modules.items() if hasattr(m, "site")]
    requests = [made.random(f"resident-{i}") for i in range(3)]
    for request in requests:  # reading, checking and packing are not the step's
        made.worker.add_adapter(request)
    assert linears
    one, two, three = requests
    with host_syncs(page_locked) as seen:
        made.step(one, None, two)
        made.step(two, two)
        made.step(three, two, None)  # the first one's slot
        made.step(None, None)
        made.step(one)
        made.step(one)  # nothing has changed
    assert seen == []
    assert made.manager.is_active(one.lora_int_id)


def test_a_step_that_asks_for_rows(on_device, page_locked) -> None:  # noqa: F811
    """Numbers of the rows, as an adapter with columns has them filled."""
    import numpy as np

    from vllm_lora_ext.conditions.column import Column
    from vllm_lora_ext.model_patches.columns import RowColumns

    made = on_device
    (wrapper,) = made.manager.punica_wrapper_mapping.values()
    rows = RowColumns(made.manager.rows, wrapper.step_map, 64)
    columns = (Column(scale=0.5, spans=((1, 4),)), Column())
    values = SimpleNamespace(at=lambda a, b: np.ones((b - a, len(columns)), dtype=np.float32))
    request = SimpleNamespace(_lora_ext_values=values)
    spans = [SimpleNamespace(request=request, start=s, stop=s + 3, at=0) for s in (0, 7)]
    with host_syncs(page_locked) as seen:
        rows._take(spans)
        rows._take(())
    assert seen == []


def test_the_gates_of_a_first_pass(on_device, page_locked) -> None:  # noqa: F811
    """X-LoRA: a classifier on the base model's hidden states, for rows that lie apart too."""
    import numpy as np

    from vllm_lora_ext.adapters.classifier import Classifier
    from vllm_lora_ext.model_patches.two_pass import TwoPass

    (wrapper,) = on_device.manager.punica_wrapper_mapping.values()
    step = wrapper.step_map
    passes = TwoPass.__new__(TwoPass)
    passes._step, passes._classifiers = step, {}
    weight = torch.empty(6, 32, pin_memory=True)
    classifier = Classifier((weight,), (None,), experts=3, top_k=2, softmax_again=True)
    hidden_TK = torch.empty(7, 32, device="meta")
    passes._classifiers[0] = classifier.map(lambda t: t.to("meta", non_blocking=True))
    with host_syncs(page_locked) as seen:
        for slots in ([0] * 7, [0, 1, 0, -1, 1, 0, 0]):
            step.update(np.array(slots))
            passes._fill(hidden_TK)
    assert seen == []
