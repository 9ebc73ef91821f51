"""Adapters that a worker makes of others, through the calls that vLLM's runners make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest

from tests.make_adapters import normal, random_module, router_spec
from tests.make_conditioned import write_random
from tests.model_patches.conftest import make_harness
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.conditions.recipe import Part, Recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.held import MEMORY_IDS
from vllm_lora_ext.routing import GateSpec, delta_reference

O_PROJ = "model.layers.0.self_attn.o_proj"
UP, GATE_UP = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"
Q, QKV = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qkv_proj"
ALORA = GateSpec(source="position", blocks=(5,))
BASE_MHA = "tests/fixtures/bases/base_llama_mha"
CONDITIONED = "tests/fixtures/conditioned"


def inputs(rows: int = 6, width: int = 128) -> torch.Tensor:
    return normal(np.random.default_rng(0), rows, width)


def recipe(h: Any, *parts: tuple[Any, float], **said: Any) -> LoRARequest:
    """A request for what is made of loaded adapters and their scales."""
    held = h.worker.versions()
    made = Recipe(
        tuple(
            Part(r.lora_name, r.lora_int_id, r.lora_path, held[r.lora_int_id].version, scale)
            for r, scale in parts
        ),
        **said,
    )
    return LoRARequest(made.name, made.lora_id(), made.path())


def loaded(h: Any, *requests: Any) -> None:
    for request in requests:
        h.worker.load(request, None, ())


def added(request: Any, layer: str, x_TK: torch.Tensor, rows: Any = None) -> torch.Tensor:
    return delta_reference(load_adapter(request.lora_path).modules[layer], x_TK, rows)


def delta(h: Any, layer: str, request: Any, x_TK: torch.Tensor, numbers: Any = None) -> Any:
    """What its slot adds at a layer, to rows that come with these numbers."""
    if numbers is not None:
        (step,) = (w.step_map for w in h.manager.punica_wrapper_mapping.values())
        step.set_rows(np.asarray(numbers, dtype=np.float32), [slice(0, len(x_TK))])
    return h.delta(layer, request, x_TK)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def code(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        call(*args)
    return caught.value.code


def test_a_constant_mix_adds_what_its_parts_add(harness: Callable[..., Any]) -> None:
    h, x_TK = harness(), inputs()
    plain, routed = h.random("plain", specs=GateSpec(), rank=9), h.random("r", specs=router_spec())
    loaded(h, plain, routed)
    parts = {n: [added(r, n, x_TK) for r in (plain, routed)] for n in (O_PROJ, UP)}
    shutil.rmtree(h.folder)  # what is loaded is enough
    both = recipe(h, (plain, -1.5), (routed, 0.5))
    report = h.worker.load(both, None, ())
    assert report.version == Recipe.parse(both.lora_path).version
    assert [part.scale for part in report.parts] == [-1.5, 0.5]
    want = {name: -1.5 * one + 0.5 * other for name, (one, other) in parts.items()}
    close(delta(h, O_PROJ, both, x_TK), want[O_PROJ])
    close(delta(h, O_PROJ, plain, x_TK), parts[O_PROJ][0])
    close(delta(h, GATE_UP, both, x_TK)[:, want[UP].shape[1] :], want[UP])
    assert h.worker.load(both, None, ()) == report, "held"
    packed = h.worker._residency.get(both.lora_int_id).host.sites.values()
    tensors = [t for site in packed for t in (site.a_RK, site.router_GK, *site.stored)]
    numbers = sum(t.nbytes for t in tensors)
    assert numbers <= report.bytes < 1.1 * numbers


def test_by_row_each_part_has_a_number_for_every_row(harness: Callable[..., Any]) -> None:
    h, x_TK = harness(), inputs()
    plain, routed = h.random("plain", specs=GateSpec()), h.random("routed", specs=router_spec())
    loaded(h, plain, routed)
    both = recipe(h, (plain, 1.0), (routed, 1.0), by_row=True)
    h.worker.load(both, None, ())
    numbers = torch.tensor([[1.0, 0], [0, 0], [0.5, 2], [-1, 1], [0, 1], [3, 0.1]])
    want = numbers[:, :1] * added(plain, O_PROJ, x_TK) + numbers[:, 1:] * added(
        routed, O_PROJ, x_TK
    )
    close(delta(h, O_PROJ, both, x_TK, numbers), want)
    assert not delta(h, O_PROJ, both, x_TK, numbers)[1].any()


def given_module(rng: np.random.Generator, gate: GateSpec) -> RoutedModule:
    rank = sum(gate.blocks)
    return RoutedModule(normal(rng, rank, 128), 0.1 * normal(rng, 128, rank), gate)


def alora(h: Any, name: str, columns: Sequence[Column] = (Column(invocation=(3, 4)),)) -> Any:
    rng = np.random.default_rng(sum(map(ord, name)))
    gate = replace(ALORA, blocks=(5,) * len(columns))
    modules = {O_PROJ: given_module(rng, gate)}
    return h.save(name, RoutedAdapter(modules, "alora", columns=tuple(columns)))


def test_columns_of_its_own_alone_and_in_a_mix(harness: Callable[..., Any]) -> None:
    h, x_TK = harness(), inputs()
    plain, own = h.random("plain", specs=GateSpec()), alora(h, "own", (Column(), Column(scale=2)))
    assert h.manager._columns is None
    loaded(h, plain)
    assert h.manager._columns is None, "nothing of the table is there before it is needed"
    loaded(h, own)
    assert h.manager._columns is not None
    report = h.worker.versions()[own.lora_int_id]
    assert report.understands["columns"] == [{}, {"scale": 2}]
    assert report.parts[0].linear and report.parts[0].width == 2
    numbers = torch.tensor([[0.0, 1], [1, 0], [0, 0], [2, -1], [1, 1], [0, 0]])
    close(delta(h, O_PROJ, own, x_TK, numbers), added(own, O_PROJ, x_TK, numbers))
    both = recipe(h, (plain, 1.0), (own, 1.0), by_row=True)
    loaded(h, both)
    factors = torch.tensor([[1.0, 1], [0, 1], [1, 0], [0.5, 0.5], [2, 3], [0, 0]])
    every = torch.cat([factors, numbers], dim=1)
    want = factors[:, :1] * added(plain, O_PROJ, x_TK)
    want += factors[:, 1:] * added(own, O_PROJ, x_TK, numbers)
    close(delta(h, O_PROJ, both, x_TK, every), want)
    scaled = recipe(h, (own, 0.5), (plain, 2.0))
    loaded(h, scaled)
    want = 0.5 * added(own, O_PROJ, x_TK, numbers) + 2 * added(plain, O_PROJ, x_TK)
    close(delta(h, O_PROJ, scaled, x_TK, numbers), want)


def test_gates_that_do_more_than_multiply_are_known(harness: Callable[..., Any]) -> None:
    h = harness()
    gate = GateSpec(source="request", blocks=(2, 3), score="softmax")
    modules = {O_PROJ: given_module(np.random.default_rng(0), gate)}
    columns = (Column(expert="a"), Column(expert="b"))
    h.worker.load(h.save("soft", RoutedAdapter(modules, "native", columns=columns)), None, ())
    (report,) = h.worker.versions().values()
    assert not report.parts[0].linear


def test_an_evicted_part_is_read_again_and_a_changed_one_refused(
    harness: Callable[..., Any],
) -> None:
    h, x_TK = harness(), inputs()
    a, b = h.random("a", specs=GateSpec()), h.random("b", specs=GateSpec())
    loaded(h, a, b)
    both, want = recipe(h, (a, 1.0), (b, 2.0)), added(a, O_PROJ, x_TK) + 2 * added(b, O_PROJ, x_TK)
    h.worker.remove_adapter(a.lora_int_id)
    h.worker.load(both, None, ())
    assert a.lora_int_id not in h.worker.versions()
    close(delta(h, O_PROJ, both, x_TK), want)
    h.worker.remove_adapter(both.lora_int_id)
    other = msgspec.structs.replace(a, lora_path=b.lora_path)
    loaded(h, other)  # another version stands under its id: what counts is the content
    h.worker.load(both, None, ())
    close(delta(h, O_PROJ, both, x_TK), want)
    h.worker.remove_adapter(both.lora_int_id)
    h.worker.remove_adapter(a.lora_int_id)
    shutil.rmtree(a.lora_path)
    shutil.copytree(b.lora_path, a.lora_path)
    assert code(h.worker.load, both, None, ()) == "adapter_changed"
    assert both.lora_int_id not in h.worker.versions()
    shutil.rmtree(a.lora_path)
    assert code(h.worker.load, both, None, ()) == "not_found"


def test_parts_from_memory_cannot_be_read_again(harness: Callable[..., Any]) -> None:
    h = harness()
    part = Part("m", MEMORY_IDS + 5, "memory:m", "v", 2.0)
    made = Recipe((part,))
    request = LoRARequest(made.name, made.lora_id(), made.path())
    assert code(h.worker.load, request, None, ()) == "adapter_changed"
    nested = Recipe((Part(made.name, made.lora_id(), made.path(), made.version, 2.0),))
    request = LoRARequest(nested.name, 7, nested.path())
    assert code(h.worker.load, request, None, ()) in ("unsupported_feature", "not_found")
    broken = LoRARequest("x", 8, "lora_ext:{")
    h.worker.prepare(broken, None)
    while not h.worker.prepared(8):
        pass
    assert code(h.worker.load, broken, None, ()) == "bad_value"


def test_a_derived_adapter_outlives_a_replaced_part(harness: Callable[..., Any]) -> None:
    h, x_TK = harness(), inputs()
    a, b = h.random("a", specs=GateSpec()), h.random("b", specs=GateSpec())
    loaded(h, a)
    twice, want = recipe(h, (a, 2.0)), 2 * added(a, O_PROJ, x_TK)
    loaded(h, twice)
    h.worker.load(msgspec.structs.replace(a, lora_path=b.lora_path, load_inplace=True), None, ())
    close(delta(h, O_PROJ, twice, x_TK), want)


def test_parts_of_a_load_under_way_stay(harness: Callable[..., Any]) -> None:
    h = harness({"host_cache_mb": 5})
    requests = [h.random(f"a{i}", specs=GateSpec(), rank=64) for i in range(4)]
    loaded(h, *requests[:2])
    mix = recipe(h, (requests[0], 0.5))
    started, go = h.worker._deriver._composer.compose, []

    def wait(*args: Any) -> Any:
        while not go:
            pass
        return started(*args)

    h.worker._deriver._composer.compose = wait
    h.worker.prepare(mix, None)
    h.worker._residency.get(2)
    assert h.worker.load(requests[2], None, frozenset()).evicted == (), "5 MiB hold three"
    assert h.worker.load(requests[3], None, frozenset()).evicted == (2,), "the oldest is read"
    go.append(1)
    while not h.worker.prepared(mix.lora_int_id):
        pass
    assert h.worker.load(mix, None, frozenset({mix.lora_int_id})).evicted
    assert not h.worker._loader.uses()


def test_slots_have_room_for_so_much(harness: Callable[..., Any]) -> None:
    h = harness({"max_router_rows": 4})
    wide = h.random("wide", specs=GateSpec(), rank=40)
    other = h.random("other", specs=GateSpec(), rank=30)
    routed = [h.random(f"r{i}", specs=router_spec(experts=3), targets=["o_proj"]) for i in (0, 1)]
    loaded(h, wide, other, *routed)
    with pytest.raises(AdapterError) as caught:
        h.worker.load(recipe(h, (wide, 1.0), (other, 1.0)), None, ())
    assert caught.value.code == "rank_too_large"
    assert "--max-lora-rank 64" in caught.value.text and "--max-lora-rank 128" in caught.value.text
    both = recipe(h, (routed[0], 1.0), (routed[1], 1.0))
    assert code(h.worker.load, both, None, ()) == "router_too_large"
    many = [(r, 1.0) for r in [routed[0]] * 65]
    assert code(h.worker.load, recipe(h, *many, by_row=True), None, ()) == "unsupported_feature"
    assert len(h.worker.versions()) == 4


def test_a_scale_that_makes_b_infinite_is_refused(harness: Callable[..., Any]) -> None:
    h, rng = harness(), np.random.default_rng(0)
    large = [random_module(rng, 128, n, GateSpec()) for n in (128, 512)]
    large = [replace(m, b_NR=m.b_NR * 1e35) for m in large]
    for name, module in zip((O_PROJ, "lm_head"), large, strict=True):
        request = h.save(name, RoutedAdapter({name: module}, "plain"))
        loaded(h, request)
        loaded(h, recipe(h, (request, 1.5)))
        with pytest.raises(AdapterError, match=name) as caught:
            h.worker.load(recipe(h, (request, 1e4)), None, ())
        assert caught.value.code == "overflow"
    assert len(h.worker.versions()) == 4


def test_embedding_and_output_matrix_stand_in_a_mix(harness: Callable[..., Any]) -> None:
    h, rng = harness(), np.random.default_rng(0)
    requests, every = [], []
    for name in ("a", "b"):
        embedding = random_module(rng, 512, 128, GateSpec(), kind="embedding")
        head = random_module(rng, 128, 512, GateSpec())
        every.append((embedding, head))
        modules = {"model.embed_tokens": embedding, "lm_head": head}
        requests.append(h.save(name, RoutedAdapter(modules, "plain")))
    loaded(h, *requests)
    ids_T, x_TK = torch.tensor([3, 5, 500]), inputs(3)
    numbers = torch.tensor([[1.0, 0], [0.5, 2], [0, 0]])
    (step,) = (w.step_map for w in h.manager.punica_wrapper_mapping.values())
    for by_row, scales in ((False, (0.5, -2.0)), (True, (1.0, 1.0))):
        mix = recipe(h, *zip(requests, scales, strict=True), by_row=by_row)
        loaded(h, mix)
        h.step(mix, mix, mix)
        step.set_rows(numbers.numpy(), [slice(0, 3)])
        factors = numbers if by_row else torch.tensor(scales).expand(3, 2)
        slot, site = h.slot_of(mix), h.manager.modules["model.embed_tokens"].site
        y_TN, want = torch.zeros(3, 128), torch.zeros(3, 128)
        torch.ops.vllm_lora_ext.embedding_lora_(
            y_TN, ids_T, h.manager.modules["model.embed_tokens"].handle
        )
        for i, (embedding, _) in enumerate(every):
            want += factors[:, i : i + 1] * (embedding.b_NR @ embedding.a_RK[:, ids_T]).t()
        close(y_TN, want)
        assert slot in site.used
        layer = h.manager.modules["lm_head"]
        y_NV, want = torch.zeros(3, 512), torch.zeros(3, 512)
        layer.add_delta(y_NV, x_TK, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
        for i, (_, head) in enumerate(every):
            want += factors[:, i : i + 1] * (x_TK @ head.a_RK.t() @ head.b_NR.t())
        close(y_NV, want)
        loaded(h, requests[0])
        h.step(requests[0])
        assert not site.factors.slots or by_row


def test_experts_that_are_whole_blocks_are_scaled_and_stay_alone(tmp_path: Path) -> None:
    from integration_tests.engines import recorded

    h = make_harness(tmp_path, {}, {"max_cpu_loras": 6}, weights=True)
    mix = h.save("mix", load_adapter(recorded("mixlora-a").folder))
    attention = h.random("attention", specs=GateSpec(), targets=["q_proj"])
    mlp = h.random("mlp", specs=GateSpec(), targets=["up_proj"])
    loaded(h, mix, attention, mlp)
    for bad in ([(mix, 1.0), (mlp, 1.0)], [(mix, 1.0)] * 2):
        assert code(h.worker.load, recipe(h, *bad), None, ()) == "unsupported_feature"
    whole, half, by_row = (
        recipe(h, (mix, scale), (attention, 2.0 if not more else 1.0), **more)
        for scale, more in ((1.0, {}), (0.5, {}), (1.0, {"by_row": True}))
    )
    loaded(h, whole, half, by_row)
    x_TK, name = inputs(), "model.layers.0.mlp"
    mlp_of = h.model.get_submodule(name)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]] * 2)

    def answer(request: Any) -> torch.Tensor:
        h.step(*[request] * len(x_TK))
        (step,) = (w.step_map for w in h.manager.punica_wrapper_mapping.values())
        step.set_rows(rows.numpy(), [slice(0, len(x_TK))])
        with torch.inference_mode():
            return mlp_of(x_TK.clone())

    base, full = answer(None), answer(whole)
    assert (full - base).abs().max() > 1e-2
    close(answer(half), base + 0.5 * (full - base))
    close(answer(by_row), base + rows[:, :1] * (full - base))
    close(answer(whole), full)


def test_a_template_is_held_and_only_what_it_derives_gets_a_slot(
    harness: Callable[..., Any],
) -> None:
    h = harness(model=BASE_MHA)
    folder = f"{CONDITIONED}/reclora-a/adapter"
    family = LoRARequest("reclora", 1, folder)
    report = h.worker.load(family, None, ())
    template = load_adapter(folder).template
    assert template is not None and report.parts == ()
    assert report.understands == {"columns": [], "user": template.user, "instruction": False}
    assert h.worker.list_adapters() == {1} and h.manager.active_ids() == set()
    assert code(h.step, family) == "missing_setting"
    assert code(h.worker.pin_adapter, 1) == "missing_setting"
    x_TK = inputs(width=64)
    for seed in range(5):  # more users than slots
        user = torch.randn(template.user, generator=torch.Generator().manual_seed(seed))
        one = recipe(h, (family, 1.0), user=tuple(user.tolist()))
        made = h.worker.load(one, None, ())
        assert made.parts[0].version.startswith(report.version)
        modules = template.derive(user, None).modules
        close(delta(h, QKV, one, x_TK)[:, :64], delta_reference(modules[Q], x_TK))
    assert code(h.worker.load, recipe(h, (family, 1.0), user=(1.0,)), None, ()) == "bad_value"
    assert code(h.worker.load, recipe(h, (family, 1.0)), None, ()) == "bad_value"


def test_target_modules_narrow_what_a_template_derives(
    harness: Callable[..., Any], tmp_path: Path
) -> None:
    h = harness(lora_target_modules=["o_proj"])
    folder = write_random("reclora_token", tmp_path / "user", 1, "base_llama", ("k", "o"))
    template = load_adapter(folder).template
    assert {name.rpartition(".")[2] for name in template.sizes} == {"k_proj", "o_proj"}
    family, user = LoRARequest("user", 1, str(folder)), torch.arange(template.user) / 2
    h.worker.load(family, None, ())
    one = recipe(h, (family, 1.0), user=tuple(user.tolist()))
    h.worker.load(one, None, ())
    want = delta_reference(template.derive(user, None).modules[O_PROJ], inputs())
    close(delta(h, O_PROJ, one, inputs()), want)
    other = write_random("reclora_ctr", tmp_path / "none", 0, "base_llama", ("q",))
    assert code(h.worker.load, LoRARequest("none", 2, str(other)), None, ()) == "empty_adapter"
