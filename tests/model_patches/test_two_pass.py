"""Two passes, without an engine: the twins, the gates of a step's rows, and what is refused."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from tests.make_adapters import BASE_LLAMA, FIXTURES
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.conditions.recipe import Part, Recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import config
from vllm_lora_ext.model_patches.attention_layers import own_attentions
from vllm_lora_ext.model_patches.rows import Span
from vllm_lora_ext.model_patches.two_pass import TWIN

ON = {"two_pass": True}
CONDITIONED = FIXTURES / "conditioned"
ATTENTION = [f"model.layers.{i}.self_attn.attn" for i in range(3)]


def xlora(name: str = "xlora_lw_topk-a", number: int = 7) -> LoRARequest:
    return LoRARequest(name, number, str(CONDITIONED / name / "adapter"))


def layers_of(h: Any) -> dict[str, Any]:
    found: dict[str, Any] = h.config.compilation_config.static_forward_context
    return {n: layer for n, layer in found.items() if "attn" in n}


def test_every_attention_layer_has_a_twin_of_the_same_kind(harness: Any) -> None:
    h = harness(ON)
    layers = layers_of(h)
    assert list(layers) == [*ATTENTION, *(f"{name}.{TWIN}" for name in ATTENTION)]
    for name in ATTENTION:
        layer, twin = layers[name], layers[f"{name}.{TWIN}"]
        assert twin is not layer and twin.impl is not layer.impl
        assert twin.get_kv_cache_spec(h.config) == layer.get_kv_cache_spec(h.config)
        twin.bind_kv_cache(torch.ones(1))
        assert not len(layer.kv_cache)


def test_nothing_of_it_without_the_setting(harness: Any) -> None:
    h = harness()
    assert list(layers_of(h)) == ATTENTION
    with pytest.raises(AdapterError, match=r'"two_pass": true.*--lora-modules') as caught:
        h.worker.add_adapter(xlora())
    assert caught.value.code == "unsupported_feature"


def step_of(h: Any) -> Any:
    return next(iter(h.manager.punica_wrapper_mapping.values())).step_map


@pytest.mark.parametrize("name", ["xlora_topk-a", "xlora_lw_topk-a"])
def test_rows_get_their_own_gates(name: str, harness: Any) -> None:
    h = harness(ON, max_loras=3, max_cpu_loras=3)
    plain, one = h.random("plain"), xlora(name)
    h.worker.add_adapter(plain)
    h.worker.add_adapter(one)
    adapter = load_adapter(one.lora_path)
    assert adapter.classifier is not None
    hidden_TK = torch.randn(8, 128)
    for rows in ([one] * 8, [plain, one, None, one, one, plain, None, one]):
        h.step(*rows)
        step = step_of(h)
        step.rows_TC.fill_(float("nan"))
        h.manager._two_pass._fill(hidden_TK)
        mine = torch.tensor([row is one for row in rows])
        got_TC = step.rows_TC[:8, : adapter.classifier.gates]
        assert torch.equal(got_TC[mine], adapter.classifier.gates_of(hidden_TK)[mine])
        assert got_TC[~mine].isnan().all()
        x_TK = torch.randn(8, 128)
        layer = "model.layers.1.self_attn.qkv_proj"
        y_TN = torch.zeros(8, 256)
        h.manager.modules[layer]._apply_lora_to_output(x_TK, y_TN)
        assert y_TN.isfinite().all()


class Twice:
    """Stands in for the model's forward: what each pass found."""

    def __init__(self, h: Any, hidden_TK: torch.Tensor) -> None:
        self.h, self.hidden_TK, self.passes = h, hidden_TK, []
        h.model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        context, step = get_forward_context(), step_of(self.h)
        layers = {name: context.no_compile_layers[name] for name in ATTENTION}
        slots_T, first = step.token_slots_T[:3].tolist(), self.h.manager.rows.in_first_pass
        metadata = dict(context.attn_metadata or {})
        self.passes.append(
            (step.active, slots_T, layers, metadata, dict(context.slot_mapping), first, kwargs)
        )
        return self.hidden_TK


def test_a_step_with_such_rows_runs_the_model_twice(harness: Any) -> None:
    h = harness(ON)
    one = xlora()
    h.worker.add_adapter(one)
    layers = layers_of(h)
    ran = Twice(h, torch.randn(3, 128))
    metadata = {name: f"metadata of {name}" for name in layers}
    slots = {name: f"slots of {name}" for name in layers}

    def run(*rows: Any, metadata: Any = metadata) -> list[Any]:
        ran.passes = []
        h.step(*rows)
        with set_forward_context(metadata, h.config, num_tokens=3, slot_mapping=slots):
            h.model(input_ids="ids", positions="positions")
        return ran.passes

    first, second = run(one, None, one)
    slot = h.slot_of(one)
    assert (first[0], first[1], first[5]) == (False, [-1, -1, -1], True)
    assert (second[0], second[1], second[5]) == (True, [slot, -1, slot], False)
    for name in ATTENTION:
        twin = f"{name}.{TWIN}"
        assert first[2][name] is layers[twin] and second[2][name] is layers[name]
        assert first[3][name] == metadata[twin] and second[3][name] == metadata[name]
        assert first[4][name] == slots[twin] and second[4][name] == slots[name]
    assert first[6] == second[6] == {"input_ids": "ids", "positions": "positions"}
    assert len(run(None, None, None)) == 1
    assert len(run(one, one, one, metadata=None)) == 1, "a dummy run"
    h.worker.remove_adapter(one.lora_int_id)
    assert len(run(None, None, None)) == 1


def test_frozen_gates_need_no_first_pass_behind_the_prompt(
    harness: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    h = harness(ON)
    folder = shutil.copytree(xlora().lora_path, tmp_path / "frozen")
    (folder / "routing.json").write_text('{"gates": "frozen"}')
    one, exact = LoRARequest("frozen", 8, str(folder)), xlora()
    with caplog.at_level("WARNING", "vllm.lora_ext"):
        h.worker.add_adapter(exact)
        assert not caplog.messages
        h.worker.add_adapter(one)
    assert "an approximation" in caplog.messages[0]
    held = h.worker.versions()
    assert [held[i].parts[0].frozen for i in (7, 8)] == [False, True]
    assert held[7].version != held[8].version
    hidden_TK = torch.randn(3, 128)
    ran, gates = Twice(h, hidden_TK), h.manager._two_pass._classifiers
    metadata = dict.fromkeys(layers_of(h), "some")

    def run(*rows: Any, at: int) -> int:
        """One request of three rows, a prompt of three tokens; how often the model runs."""
        ran.passes = []
        h.step(*rows)
        request: Any = SimpleNamespace(req_id="r", prompt_token_ids=[1, 2, 3])
        spans = [Span(request, 0, 3, at, h.slot_of(rows[0]), False)]
        h.manager._two_pass._frozen._take(spans)
        with set_forward_context(metadata, h.config, num_tokens=3, slot_mapping=metadata):
            h.model()
        return len(ran.passes)

    assert run(one, one, one, at=0) == 2
    want_TC = gates[h.slot_of(one)].gates_of(hidden_TK)
    got_TC = step_of(h).rows_TC[:3, : want_TC.shape[1]]
    assert torch.equal(got_TC, want_TC)
    got_TC.fill_(float("nan"))
    assert run(one, one, one, at=3) == 1
    assert torch.equal(got_TC, want_TC[-1:].expand(3, -1))
    assert run(one, one, one, at=2) == 2
    assert torch.equal(got_TC, want_TC[:1].expand(3, -1)), "its first row is the prompt's last"
    assert run(exact, exact, exact, at=3) == 2


def test_what_a_slot_held_before_is_gone(harness: Any) -> None:
    h = harness(ON, max_loras=1)
    one, other = xlora(), h.random("other")
    h.worker.add_adapter(one)
    h.step(one)
    assert list(h.manager._two_pass._classifiers) == [0]
    h.worker.add_adapter(other)
    h.step(other)
    assert not h.manager._two_pass._classifiers
    h.step(one)
    assert list(h.manager._two_pass._classifiers) == [0]


def test_too_many_gates(harness: Any) -> None:
    h = harness(ON | {"max_gates": 44})
    with pytest.raises(AdapterError, match=r'seen: 45.*"max_gates": 45') as caught:
        h.worker.add_adapter(xlora())
    assert caught.value.code == "unsupported_feature"
    h.worker.add_adapter(xlora("xlora_topk-a", 8))


def test_another_models_adapter(harness: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        harness(ON).worker.add_adapter(xlora("xlora_flat-a"))
    assert caught.value.code == "shape_mismatch"


def test_it_is_no_part_of_a_mix(harness: Any) -> None:
    h = harness(ON)
    one = xlora()
    h.worker.add_adapter(one)
    version = h.worker.versions()[one.lora_int_id].version
    recipe = Recipe((Part(one.lora_name, one.lora_int_id, one.lora_path, version, 0.5),))
    with pytest.raises(AdapterError, match="cannot be one of several, or scaled") as caught:
        h.worker.add_adapter(LoRARequest(recipe.name, (1 << 30) + (1 << 29) + 1, recipe.path()))
    assert caught.value.code == "unsupported_feature"


class TestAServersOwnAdapters:
    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        monkeypatch.setattr(
            EngineArgs, "from_cli_args", config._finding_two_pass(EngineArgs.from_cli_args)
        )

        def make(*paths: Path | str, **given: Any) -> Any:
            modules = [Namespace(name="a", path=str(path)) for path in paths]
            args = Namespace(model=str(BASE_LLAMA), lora_modules=modules or None, **given)
            return AsyncEngineArgs.from_cli_args(args).additional_config

        return make

    def test_turn_the_setting_on(self, made: Any) -> None:
        plain, one = FIXTURES / "routed/plain-a/adapter", xlora().lora_path
        assert not made() and not made(plain) and not made("some/hub-repository")
        assert made(plain, one) == {"lora_ext": {"two_pass": True}}
        given = {"lora_ext": {"trace": True}, "other": 1}
        assert made(one, additional_config=given) == {
            "lora_ext": {"trace": True, "two_pass": True}, "other": 1,
        }  # fmt: skip

    def test_but_for_an_operator_who_has_turned_it_off(self, made: Any) -> None:
        off = {"lora_ext": {"two_pass": False}}
        assert made(xlora().lora_path, additional_config=off) == off


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline stage"),
        ({"runner": "pooling"}, "generates"),
    ],
)
def test_engines_that_cannot(options: dict[str, Any], words: str, harness: Any) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        harness(ON, **options)
    assert caught.value.code == "bad_settings"


class Scan(torch.nn.Module, AttentionLayerBase):
    """A layer with a state, as Mamba's are: it has no `layer_name`."""

    def get_attn_backend(self) -> Any: ...

    def get_kv_cache_spec(self, vllm_config: Any) -> None: ...


def test_models_with_other_states_cannot() -> None:
    model = torch.nn.ModuleDict({"mixer": Scan()})
    with pytest.raises(AdapterError, match=r"mixer: Scan") as caught:
        own_attentions(model, "two_pass", windows=True)
    assert caught.value.code == "bad_settings"
