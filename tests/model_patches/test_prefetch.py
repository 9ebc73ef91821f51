"""The setting `prefetch_weights`: which layers follow which, and where it is refused. No kernel
runs; `tests/kernels/test_prefetch.py` has what it reads, `test_dual_stream.py` when it is launched.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lora_ext.errors import AdapterError

pytest.importorskip("triton")
ON = {"prefetch_weights": True}


@pytest.fixture
def fetching(harness, monkeypatch):
    """Harnesses with the Triton backend, and the second stream on for who asks."""
    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches import config, manager

    monkeypatch.setattr(config, "check_kernels", lambda *_: None)
    monkeypatch.setattr(config, "envs", SimpleNamespace(VLLM_LORA_ENABLE_DUAL_STREAM=True))
    monkeypatch.setattr(manager, "choose_backend", lambda *_: choice.triton())
    monkeypatch.setattr(manager, "optional_selfcheck", lambda *_: None)
    monkeypatch.setattr(manager.RoutedLoRAModelManager, "_warm", lambda *_: None)
    return harness


def sites(made: Any) -> dict[str, Any]:
    return {n: m.site for n, m in made.manager.modules.items() if hasattr(m, "has_product")}


def test_every_layer_is_followed_by_the_one_that_the_model_runs_next(fetching) -> None:
    found = sites(fetching(ON))
    layer = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    count = len(found) // len(layer)
    order = [f"model.layers.{i}.{name}" for i in range(count) for name in layer]
    assert count > 1 and set(order) == set(found)
    for name, after in zip(order, [*order[1:], None], strict=True):
        assert found[name].prefetches
        assert found[name].following is (after and found[after])


def test_layers_run_in_the_order_in_which_they_are_known(harness) -> None:
    """What `prefetch_in_order` is told is what the model's forward does."""
    import inspect

    made = harness({})
    block = made.model.get_submodule("model.layers.0")
    for module, names in (
        (block, ("self_attn", "mlp")),
        (block.self_attn, ("qkv_proj", "o_proj")),
        (block.mlp, ("gate_up_proj", "down_proj")),
    ):
        source = inspect.getsource(type(module).forward)
        first, second = (source.index(f"self.{name}(") for name in names)
        assert first < second
        registered = [n for n, _ in module.named_children() if n in names]
        assert registered == list(names)


def test_without_the_setting_no_layer_fetches(fetching) -> None:
    assert not any(s.prefetches or s.following for s in sites(fetching({})).values())


def test_layers_with_rows_below_their_weight_are_fetched_for_by_nobody(fetching) -> None:
    found = sites(fetching({**ON, "extend_weights": 1e6})).values()
    assert all(s.prefetches and s.extension is not None for s in found)
    assert not any(s.following for s in found)


def test_it_is_refused_where_nothing_runs_beside_a_product(fetching, monkeypatch) -> None:
    from vllm_lora_ext.model_patches import config

    monkeypatch.setattr(config, "envs", SimpleNamespace(VLLM_LORA_ENABLE_DUAL_STREAM=False))
    with pytest.raises(AdapterError, match="prefetch_weights") as caught:
        fetching(ON)
    assert caught.value.code == "bad_settings"
    assert "VLLM_LORA_ENABLE_DUAL_STREAM=1" in str(caught.value)
    assert fetching({}).manager.modules


@pytest.mark.parametrize(("value", "seen"), [(True, "cpu"), ("yes", "yes"), (1, "1")])
def test_it_is_refused_where_no_kernel_runs_or_it_is_no_switch(value, seen, harness) -> None:
    with pytest.raises(AdapterError, match="prefetch_weights") as caught:
        harness({"prefetch_weights": value})
    assert caught.value.code == "bad_settings" and f"seen: {seen}" in str(caught.value)


def test_a_kernel_that_fails_its_check_refuses_the_setting(fetching, monkeypatch) -> None:
    from vllm_lora_ext.model_patches import manager

    asked: list[Any] = []

    def check(*args: Any) -> str:
        asked.append(args[-3:])
        return "PTXASError: no such instruction"

    monkeypatch.setattr(manager, "optional_selfcheck", check)
    with pytest.raises(AdapterError, match="prefetch_weights") as caught:
        fetching(ON)
    assert caught.value.code == "bad_settings" and "no such instruction" in caught.value.text
    assert asked == [(False, False, True)]
