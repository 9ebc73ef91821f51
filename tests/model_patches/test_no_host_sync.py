"""What a step asks of the adapters' manager never makes the host wait for the device.

The manager is a worker's own, with the Triton backend; its layers' tensors have no memory and stand
for the device's (`tests.host_syncs`).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
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


def test_the_logits_of_rows_that_lie_anywhere(on_device, page_locked) -> None:  # noqa: F811
    """The output matrix: a slot with factors of the rows beside one without."""
    from vllm_lora_ext.kernels.gated_lora import Factors
    from vllm_lora_ext.model_patches.logits import RoutedLogits

    (wrapper,) = on_device.manager.punica_wrapper_mapping.values()
    layer, step = RoutedLogits.__new__(RoutedLogits), wrapper.step_map
    torch.nn.Module.__init__(layer)
    layer.step, layer.used, layer.factors = step, {0, 1}, Factors(2, 4, DEVICE)
    sampled_N = torch.empty(3, dtype=torch.int64, device=DEVICE)
    layer.rows = SimpleNamespace(logits_rows=lambda _x: sampled_N)
    columns_R = torch.empty(4, dtype=torch.int64, pin_memory=True).zero_()
    a_S1RK, b_S1VR, x_NK, y_NV = (
        torch.empty(*shape, dtype=torch.bfloat16, device=DEVICE)
        for shape in ((2, 1, 4, 32), (2, 1, 40, 4), (3, 32), (3, 48))
    )
    with host_syncs(page_locked) as seen:
        layer.factors.set(1, columns_R)
        step.update(np.array([0, 1, 1, -1, 0]))
        layer.add_delta(y_NV, x_NK, a_S1RK, b_S1VR, 1.0)
        layer.factors.clear(1)
    assert seen == []


def spans(*of: tuple[int, int, int]) -> list[SimpleNamespace]:
    """One for each (start, stop, first position), of requests with prompts of four tokens."""
    return [
        SimpleNamespace(
            request=SimpleNamespace(req_id=str(i), prompt_token_ids=[1] * 4, prompt_embeds=None),
            slot=0, start=start, stop=stop, at=at,
        )
        for i, (start, stop, at) in enumerate(of)
    ]  # fmt: skip


def test_gates_that_are_frozen_behind_a_prompt(on_device, page_locked) -> None:  # noqa: F811
    from vllm_lora_ext.model_patches.frozen_gates import FrozenGates

    (wrapper,) = on_device.manager.punica_wrapper_mapping.values()
    watch = SimpleNamespace(knows=lambda _key: True)
    frozen = FrozenGates(SimpleNamespace(watch=lambda *_: watch), wrapper.step_map)
    with host_syncs(page_locked) as seen:
        frozen._take(spans((0, 4, 0), (4, 7, 2)))
        frozen.keep(0, 3)
        frozen._take(spans((0, 1, 4), (1, 3, 5)))
        assert frozen.known({0})
        frozen.fill({0})
    assert seen == []


def test_the_states_of_an_instruction(page_locked) -> None:  # noqa: F811
    """What goes into the final norm is pooled where it stands, chunk after chunk; only the first of
    an adapter's brings the gate's layers there."""
    from vllm_lora_ext.adapters.instruction_gate import AttentionPooling, GateLayers
    from vllm_lora_ext.model_patches.instruction import InstructionPass, _Pass

    layers = GateLayers(*(torch.zeros(n) for n in ((8, 32), 8, (4, 8), 4, (1, 4), 1)))
    passes = InstructionPass.__new__(InstructionPass)
    passes._rows = SimpleNamespace(in_first_pass=False)
    norm, hidden_TK = torch.nn.Identity(), torch.empty(7, 32, dtype=torch.bfloat16, device=DEVICE)
    layers.on(DEVICE)
    with host_syncs(page_locked) as seen:
        for chunks in ([(0, 2, 0), (2, 6, 0)], [(3, 5, 2)]):
            passes._spans = spans(*chunks)
            if chunks[0][2] == 0:
                passes._passes = {str(i): _Pass(AttentionPooling(layers), 4) for i in range(2)}
            passes._see(norm, (hidden_TK, hidden_TK))
    assert seen == [] and [found.seen for found in passes._passes.values()] == [4, 4]


def test_an_attention_over_ranks(on_device, page_locked) -> None:  # noqa: F811
    """What stands around vLLM's own attention, for rows that lie apart and for those that do
    not."""
    from vllm_lora_ext.model_patches.rank_attention import RankAttention
    from vllm_lora_ext.model_patches.residency import Projection

    attention = RankAttention.__new__(RankAttention)
    attention._shape = SimpleNamespace(heads=4, head_size=16)
    part = SimpleNamespace(y_start=0, y_stop=24, bt_RN=torch.empty(8, 24, device=DEVICE))
    own = Projection(torch.empty(24, 8, device=DEVICE), 2)
    a_RK = torch.empty(8, 32, dtype=torch.bfloat16, device=DEVICE)
    at_T = torch.empty(2, dtype=torch.int64, device=DEVICE)
    x_TK, y_TN = (torch.empty(7, n, dtype=torch.bfloat16, device=DEVICE) for n in (32, 48))
    rows = [(slice(1, 4), own, a_RK, part), (at_T, own, a_RK, part)]
    with host_syncs(page_locked) as seen:
        attention._attend_(lambda q, k, v: q + k + v, rows, y_TN, x_TK)
    assert seen == []
