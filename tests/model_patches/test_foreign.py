"""Tools that replace vLLM's own `_load_adapter`, as RL frameworks do to hand tensors over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.host_syncs import page_locked  # noqa: F401
from tests.make_adapters import FIXTURES, normal
from tests.steps import Steps
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import delta_reference

PLAIN = FIXTURES / "routed/plain-a/adapter"
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What the framework verl does: its own request with tensors, its own `_load_adapter`."""
    import json

    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    class TensorLoRARequest(LoRARequest, omit_defaults=True, array_like=True):  # type: ignore[call-arg]
        peft_config: dict | None = None
        lora_tensors: dict | None = None

    def load(self: Any, request: Any) -> Any:
        assert isinstance(request, TensorLoRARequest)
        helper = PEFTHelper.from_dict(request.peft_config)
        helper.validate_legal(self.lora_config)
        mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
        return self._lora_model_cls.from_lora_tensors(
            request.lora_int_id, request.lora_tensors, helper, "cpu",
            self.lora_config.lora_dtype, weights_mapper=mapper and mapper.get_rename_mapper(),
        )  # fmt: skip

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", load)
    config = json.loads((PLAIN / "adapter_config.json").read_text())
    tensors = load_file(PLAIN / "adapter_model.safetensors")

    def request(number: int = 1, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Any:
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        change(own)
        return TensorLoRARequest(
            f"rl{number}", number, "memory", peft_config=config, lora_tensors=own
        )

    return request


def test_tensors_are_served_from_our_slots(
    harness: Callable[..., Any], replaced: Callable[..., Any]
) -> None:
    h = harness()
    x_TK = normal(np.random.default_rng(0), 4, 128)
    assert h.runner.add_lora(replaced())
    request = replaced()
    want = delta_reference(load_adapter(PLAIN).modules[O_PROJ], x_TK)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(h.delta(O_PROJ, request, x_TK), want)
    assert (h.worker.versions()[1].system, h.worker.versions()[1].rank) == ("plain", 8)
    h.worker.remove_all_adapters()
    torch.testing.assert_close(h.delta(O_PROJ, request, x_TK), want)


def test_the_version_is_the_content(
    harness: Callable[..., Any], replaced: Callable[..., Any]
) -> None:
    h = harness(max_loras=3, max_cpu_loras=3)

    def nudge(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] += 1

    for request in (replaced(1), replaced(2), replaced(3, nudge)):
        h.runner.add_lora(request)
    versions = [report.version for _, report in sorted(h.worker.versions().items())]
    assert versions[0] == versions[1] != versions[2]


def test_bad_tensors_are_refused_before_a_slot(
    harness: Callable[..., Any], replaced: Callable[..., Any]
) -> None:
    h = harness()

    def poison(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    def narrow(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if "lora_A" in n)
        tensors[name] = tensors[name][:, 1:]

    for change, code in ((poison, "not_finite"), (narrow, "shape_mismatch")):
        with pytest.raises(AdapterError) as error:
            h.runner.add_lora(replaced(1, change))
        assert error.value.code == code
    assert h.worker.list_adapters() == set()


def test_what_only_stock_can_form(
    harness: Callable[..., Any],
    replaced: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    page_locked: set[int],  # noqa: F811
) -> None:
    """A layer that the model has not, which stock leaves out: formed once, when it is loaded."""
    h = harness(max_loras=1, max_cpu_loras=1)
    h.manager.placer._pinned = True
    x_TK = normal(np.random.default_rng(0), 4, 128)

    def more(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "layers.0." in n]:
            tensors[name.replace("layers.0.", "layers.77.")] = tensors[name]

    own = load_adapter(PLAIN).modules
    layers = {
        name: delta_reference(own[name], x_TK) for name in own if own[name].a_RK.shape[1] == 128
    }
    requests = [replaced(number, more) for number in (1, 2)]
    for request in requests:
        h.runner.add_lora(request)
    assert all(h.worker._residency.get(i).host.version for i in (1, 2))
    steps = Steps(monkeypatch)
    for request in (*requests, requests[0]):
        with steps.watch():
            h.worker._apply_adapters({request})
        for name, want in layers.items():
            parts = h.manager.packed_modules
            layer = next((n for n, names in parts.items() if name in names), name)
            got = h.delta(layer, request, x_TK)
            at = parts[layer].index(name) if layer in parts else 0
            got = got.split(h.manager.modules[layer].output_slices, 1)[at]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(page_locked) > 0


def test_what_stock_cannot_form_is_refused(
    harness: Callable[..., Any], replaced: Callable[..., Any]
) -> None:
    h = harness()

    def wider(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if n.endswith("layers.0.self_attn.o_proj.lora_B.weight"))
        tensors[name] = torch.cat([tensors[name]] * 2)
        elsewhere(tensors)

    def elsewhere(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "layers.0." in n]:
            tensors[name.replace("layers.0.", "layers.77.")] = tensors[name]

    def nowhere(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace("layers.", "others.")] = tensors.pop(name)

    def nothing(tensors: dict[str, Any]) -> None:
        tensors.clear()

    def poison(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")
        elsewhere(tensors)

    for change, code in (
        (wider, "shape_mismatch"), (nowhere, "unknown_module"), (nothing, "empty_adapter"),
        (poison, "not_finite"),
    ):  # fmt: skip
        with pytest.raises(AdapterError) as error:
            h.runner.add_lora(replaced(1, change))
        assert error.value.code == code
    assert h.worker.list_adapters() == set()


def test_folders_are_still_read_by_our_readers(
    harness: Callable[..., Any], replaced: Callable[..., Any]
) -> None:
    h = harness()
    request = h.random("routed")
    assert h.runner.add_lora(request)
    assert h.worker.versions()[1].system == "random"
