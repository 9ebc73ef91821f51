"""Adapters in host memory and in slots, driven through the calls that vLLM's runners make."""

from __future__ import annotations

import gc
import shutil
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.host_syncs import host_syncs, page_locked  # noqa: F401
from tests.make_adapters import linear_shapes, normal, random_adapter, random_module, router_spec
from tests.steps import Steps, onto_device
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.model_patches import residency
from vllm_lora_ext.model_patches.composing import Ingredient
from vllm_lora_ext.model_patches.residency import Residency, Resident, _pieces, flat_views
from vllm_lora_ext.routing import GateSpec, delta_reference

UP, O_PROJ = "model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.o_proj"
MiB = 1 << 20


def inputs(rows: int = 5) -> torch.Tensor:
    return normal(np.random.default_rng(0), rows, 128)


def expected(request: Any, x_TK: torch.Tensor) -> torch.Tensor:
    return delta_reference(load_adapter(request.lora_path).modules[O_PROJ], x_TK)


def assert_serves(h: Any, request: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(h.delta(O_PROJ, request, inputs()), want, rtol=1e-4, atol=1e-4)


def code_of(error: pytest.ExceptionInfo[AdapterError]) -> str:
    assert error.value.text.count("; ") >= 1, "says what was seen or allowed"
    return error.value.code


def test_a_slot_adds_what_the_folder_says(harness: Callable[..., Any]) -> None:
    h = harness()
    request = h.random("mixed")
    report = h.worker.load(request, None, ())
    modules = load_adapter(request.lora_path).modules
    assert_serves(h, request, expected(request, inputs()))
    parts = [modules[f"model.layers.0.mlp.{n}"] for n in ("gate_proj", "up_proj")]
    both = torch.cat([delta_reference(p, inputs()) for p in parts], dim=1)
    torch.testing.assert_close(h.delta(UP, request, inputs()), both, rtol=1e-4, atol=1e-4)
    assert report.version == load_adapter(request.lora_path).digest
    assert (report.system, report.evicted) == ("random", ())
    assert h.worker.versions() == {request.lora_int_id: report}


@pytest.mark.parametrize("triton", [False, True])
def test_a_step_copies_few_times_and_does_nothing_else(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, triton: bool
) -> None:
    if triton:  # the GPU's layout of slots, on a CPU
        manager = "vllm_lora_ext.model_patches.manager"
        monkeypatch.setattr(f"{manager}.choose_backend", lambda *_: choice.triton())
        monkeypatch.setattr(f"{manager}.RoutedLoRAModelManager._warm", lambda *_: None)
    h = harness()
    spec = [GateSpec(), router_spec()]
    requests = [h.random(f"a{i}", specs=spec) for i in range(4)]
    for request in requests:
        h.worker.load(request, None, ())
    steps, manager = Steps(monkeypatch), h.manager
    with steps.watch():
        h.worker._apply_adapters(set(requests[2:]))
    assert {r.lora_int_id for r in requests[2:]} == manager.active_ids()
    sites = 4 * 3  # linears of a layer, layers
    most = 5 * sites  # A, B, the slot's two rows of tables; a router where there is one
    # A slot on a CPU is the host copy where it stands.
    assert 0 < steps.copies <= 2 * most if triton else steps.copies == 0


def test_a_working_set_larger_than_vllms_cache_rotates_without_its_files(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = harness(max_loras=2, max_cpu_loras=2)
    requests = [h.random(f"a{i}") for i in range(5)]
    want = [expected(r, inputs()) for r in requests]
    for request in requests:
        h.worker.load(request, None, ())
    shutil.rmtree(h.folder)
    steps = Steps(monkeypatch)
    for _ in range(2):
        for request, value in zip(requests, want, strict=True):
            with steps.watch():
                h.worker._apply_adapters({request})
            assert_serves(h, request, value)
            assert len(h.manager) <= 2


def test_a_steps_adapters_do_not_put_each_other_out(harness: Callable[..., Any]) -> None:
    h = harness(max_loras=3, max_cpu_loras=3)
    requests = [h.random(f"a{i}", layers=[0]) for i in range(5)]
    for request in requests:
        h.worker.load(request, None, ())
    rng = np.random.default_rng(0)
    for _ in range(40):
        chosen = [requests[i] for i in rng.permutation(5)[: rng.integers(1, 4)]]
        h.step(*chosen)
        assert {r.lora_int_id for r in chosen} <= h.manager.active_ids()


def test_dummy_batches_warm_ups_and_new_base_weights_drop_no_host_copy(
    harness: Callable[..., Any],
) -> None:
    """An idle data-parallel rank runs a dummy batch, through vLLM's own context."""
    h = harness()
    requests = [h.random(f"a{i}", layers=[0]) for i in range(4)]
    want = [expected(r, inputs()) for r in requests]
    for request in requests:
        h.worker.load(request, None, ())
    h.worker.pin_adapter(1)
    held = h.worker.versions()
    shutil.rmtree(h.folder)
    one = np.ones(1, dtype=np.int32)
    lora = h.config.lora_config
    for active in (0, 2):
        with h.runner.maybe_dummy_run_with_lora(lora, one, one, num_active_loras=active):
            pass
        h.runner.maybe_remove_all_loras(lora)
        h.runner.reset_lora_state()
        assert h.worker.versions() == held and h.worker.pinned_adapters() == {1}
        for request, value in zip(requests, want, strict=True):
            assert_serves(h, request, value)


def test_a_removed_adapter_is_gone(harness: Callable[..., Any]) -> None:
    h = harness()
    request = h.random("a")
    h.worker.load(request, None, ())
    h.step(request)
    assert h.worker.remove_adapter(1) and not h.worker.remove_adapter(1)
    assert h.worker.versions() == {} and h.worker.list_adapters() == set()
    with pytest.raises(AdapterError) as error:
        h.step(request)
    assert code_of(error) == "not_found"


def test_other_weights_in_place(harness: Callable[..., Any]) -> None:
    import msgspec

    h = harness()
    request, other = h.random("a"), h.random("b")
    first = h.worker.load(request, None, ())
    h.step(request)
    new = msgspec.structs.replace(request, lora_path=other.lora_path)
    assert h.worker.load(new, None, ()) == first, "nothing is read again unasked"
    inplace = msgspec.structs.replace(new, load_inplace=True)
    second = h.worker.load(inplace, None, ())
    assert second.version != first.version
    assert_serves(h, request, expected(other, inputs()))
    bad = msgspec.structs.replace(inplace, lora_path=str(h.folder / "none"))
    with pytest.raises(AdapterError):
        h.worker.load(bad, None, ())
    assert_serves(h, request, expected(other, inputs()))


def test_the_least_recently_used_makes_room_never_one_in_use(harness: Callable[..., Any]) -> None:
    plain = {"specs": GateSpec(), "rank": 64}
    h = harness({"host_cache_mb": 5})
    requests = [h.random(f"a{i}", **plain) for i in range(5)]
    size = h.worker.load(requests[0], None, ()).bytes
    assert 1.2 * MiB < size < 2.5 * MiB
    h.worker.load(requests[1], None, ())
    h.worker.load(requests[2], None, ())
    h.step(requests[0])
    h.worker.load(requests[0], None, ())  # used again
    report = h.worker.load(requests[3], None, frozenset({3}))
    assert report.evicted == (2,) and set(h.worker.versions()) == {1, 3, 4}
    h.worker.pin_adapter(1)
    with pytest.raises(AdapterError) as error:
        h.worker.load(requests[4], None, frozenset({3, 4}))
    assert code_of(error) == "host_cache_full"
    assert set(h.worker.versions()) == {1, 3, 4}
    h.step(requests[3], requests[0])


def test_the_budget_counts_bytes_in_the_slots_dtype(harness: Callable[..., Any]) -> None:
    h = harness()
    adapter = random_adapter(h.config.model_config.hf_config, specs=GateSpec(), rank=64)
    report = h.worker.load(h.save("a", adapter), None, ())
    numbers = sum(m.a_RK.numel() + m.b_NR.numel() for m in adapter.modules.values())
    assert 4 * numbers <= report.bytes < 4.1 * numbers


def test_by_default_as_much_fits_as_vllm_would_hold(harness: Callable[..., Any]) -> None:
    h = harness(max_cpu_loras=2000)
    shapes = linear_shapes(h.config.model_config.hf_config)
    numbers = 64 * (sum(k + n for k, n in shapes.values()) + 2 * (128 + 512))
    assert h.manager.slot_nbytes == 4 * numbers
    assert h.worker._residency.limit == 2000 * 4 * numbers > 2048 * MiB
    assert harness().worker._residency.limit == 2048 * MiB


def test_pinned_adapters_keep_their_slots(harness: Callable[..., Any]) -> None:
    h = harness(max_loras=2, max_cpu_loras=2)
    requests = [h.random(f"a{i}", layers=[0]) for i in range(4)]
    for request in requests[:3]:
        h.worker.load(request, None, ())
    assert h.worker.pin_adapter(2)
    slot = h.slot_of(requests[1])
    for request in (*requests[:3], *requests[:3]):
        h.step(request)
        assert h.slot_of(requests[1]) == slot
    with pytest.raises(AdapterError) as error:
        h.step(requests[0], requests[2])
    assert code_of(error) == "slots_pinned"
    assert h.worker.pin_adapter(1) and h.worker.pinned_adapters() == {1, 2}
    assert h.worker.load(requests[3], None, ()).evicted == (), "host memory has room"
    for refused in (lambda: h.step(requests[3]), lambda: h.worker.pin_adapter(4)):
        with pytest.raises(AdapterError) as error:
            refused()
        assert code_of(error) == "slots_pinned"
    h.step(*requests[:2])
    assert h.worker.remove_adapter(1) and h.worker.pinned_adapters() == {2}
    h.step(requests[3], requests[1])


def test_reading_in_a_thread_then_taking_it(harness: Callable[..., Any]) -> None:
    h = harness()
    request, bad = h.random("a"), h.random("b")
    shutil.rmtree(bad.lora_path)
    h.worker.prepare(request, None)
    h.worker.prepare(bad, None)
    while not (h.worker.prepared(1) and h.worker.prepared(2)):
        pass
    want = expected(request, inputs())
    shutil.rmtree(request.lora_path)
    h.worker.load(request, None, ())
    assert_serves(h, request, want)
    with pytest.raises(AdapterError) as error:
        h.worker.load(bad, None, ())
    assert code_of(error) == "not_found"


def test_slots_grow_where_no_step_runs(harness: Callable[..., Any]) -> None:
    """Reading may go on beside a step, which fills the tables that would be moved."""
    h = harness()
    request = h.random("routed", specs=router_spec())
    found = [getattr(m, "site", None) for m in h.manager.modules.values()]
    sites = [site for site in found if isinstance(site, Site)]
    before = [site.router_SGK.shape for site in sites]
    resident = h.worker._read(request, None)
    assert [site.router_SGK.shape for site in sites] == before
    assert resident.host.sites and not any(shape[1] for shape in before)
    h.worker.load(request, None, ())
    assert any(site.router_SGK.shape[1] for site in sites)


def test_a_refused_adapter_leaves_nothing_to_the_collector(harness: Callable[..., Any]) -> None:
    """Its tensors would be held until the next collection, which may be minutes."""
    h = harness()
    for ahead in (True, False):
        bad = h.random(f"bad-{ahead}")
        shutil.rmtree(bad.lora_path)
        gc.collect()
        gc.disable()
        try:
            if ahead:
                h.worker.prepare(bad, None)
                while not h.worker.prepared(bad.lora_int_id):
                    pass
            with pytest.raises(AdapterError) as error:
                h.worker.load(bad, None, ())
            refused = weakref.ref(error.value)
            del error
            assert refused() is None
        finally:
            gc.enable()


def test_a_wrong_layer_is_told_what_the_model_has(harness: Callable[..., Any]) -> None:
    h = harness()
    adapter = random_adapter(h.config.model_config.hf_config)
    modules = {f"{name}x": m for name, m in adapter.modules.items()}
    with pytest.raises(AdapterError) as error:
        h.worker.load(h.save("a", RoutedAdapter(modules, "random")), None, ())
    assert code_of(error) == "unknown_module"
    assert "23 layers" in error.value.text, "seven linears of three layers, embedding and output"


def test_experts_of_mlp_blocks_are_held_and_served(harness: Callable[..., Any]) -> None:
    from integration_tests.engines import recorded

    h = harness()
    request = h.save("mix", load_adapter(recorded("mixlora-a").folder))
    h.worker.load(request, None, ())
    shutil.rmtree(h.folder)
    h.step(request)
    assert all(block.site.busy for block in h.manager.blocks.values())
    h.worker.remove_all_adapters()
    assert not any(block.site.busy for block in h.manager.blocks.values())


def resident(nbytes: int) -> Resident:
    return Resident(None, "v", nbytes, "plain")


def test_residency_replaces_without_counting_twice() -> None:
    kept = Residency(10)
    assert kept.put(1, resident(6), ()) == () and kept.put(2, resident(4), ()) == ()
    assert kept.put(1, resident(5), {1, 2}) == () and kept.nbytes == 9
    with pytest.raises(AdapterError):
        kept.put(1, resident(7), {1, 2})
    assert kept.nbytes == 9 and 1 in kept
    assert kept.put(3, resident(5), {1}) == (2,) and kept.nbytes == 10


@pytest.mark.parametrize("piece", [1, 600, 1 << 20, sys.maxsize])
def test_flat_views_do_not_overlap(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(residency._PIECE, False, piece)
    groups = [
        [((3, 5), torch.bfloat16), ((0, 7), torch.float32), ((40, 9), torch.float32)],
        [((9,), torch.int32)],
        [],
    ]
    nbytes, groups_of_views = flat_views(groups, False)
    views = [view for group in groups_of_views for view in group]
    for i, view in enumerate(views):
        view.fill_(i + 1)
    assert [len(group) for group in groups_of_views] == [3, 1, 0]
    assert all(view.eq(i + 1).all() for i, view in enumerate(views))
    assert [(tuple(v.shape), v.dtype) for v in views] == [s for group in groups for s in group]
    assert nbytes == 256 + 0 + 1536 + 256


def test_pieces_of_page_locked_memory_waste_little() -> None:
    sizes = [int(s) for s in np.random.default_rng(0).integers(1, 4 << 20, 500)]
    taken = sum(1 << (sum(run) - 1).bit_length() for run in _pieces(sizes, 64 << 20))
    assert taken < 1.1 * sum(sizes)


EMBEDDINGS = "model.embed_tokens", "lm_head"


def on_matrices(h: Any, name: str) -> tuple[Any, RoutedAdapter]:
    """A plain adapter of the embedding and the output matrix, as a folder and as it was made."""
    rng = np.random.default_rng(len(name))
    embedding = random_module(rng, 512, 128, GateSpec(), kind="embedding")
    head = random_module(rng, 128, 512, GateSpec())
    adapter = RoutedAdapter(dict(zip(EMBEDDINGS, (embedding, head), strict=True)), "plain")
    return h.save(name, adapter), adapter


def test_plain_lora_on_embedding_and_output_matrix(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock's own layers: a step only copies there as well."""
    h = harness(dtype="bfloat16", max_loras=1, max_cpu_loras=2)
    made = [on_matrices(h, name) for name in ("a", "other")]
    for request, _ in made:
        h.worker.load(request, None, ())
    steps = Steps(monkeypatch, strided=True)
    for request, adapter in reversed(made):  # the first one has the slot
        with steps.watch():
            h.worker._apply_adapters({request})
        slot = h.slot_of(request)
        for name, module in adapter.modules.items():
            layer = h.manager.modules[name]
            a, b = layer.lora_a_stacked[slot], layer.lora_b_stacked[slot, 0]
            a = a[:, :6].t() if name != "lm_head" else a[0, :6]
            assert torch.equal(a, module.a_RK.bfloat16()) and a.abs().sum() > 0
            assert torch.equal(b[:, :6], module.b_NR.bfloat16())
    assert steps.copies == 2 * 4


def test_matrices_go_into_slots_without_a_wait(
    harness: Callable[..., Any],
    page_locked: set[int],  # noqa: F811
) -> None:
    """Also where a part of them differs by token, of one adapter or of two together."""
    h = harness(max_loras=1, max_cpu_loras=4)
    h.manager.placer._pinned = h.manager.composer._pinned = True
    (one, _), (two, _) = on_matrices(h, "a"), on_matrices(h, "other")
    for request in (one, two):
        h.worker.load(request, None, ())
    held = [h.worker._residency.get(r.lora_int_id) for r in (one, two)]
    both = h.manager.composer.compose(
        [
            Ingredient(name, held.version, held.host, 1.0 if by_row else 0.5, by_row)
            for name, held, by_row in zip("ab", held, (True, False), strict=True)
        ],
        "both",
        "both",
    )
    assert both.factors.keys() == set(EMBEDDINGS)
    onto_device(h.manager.modules[name] for name in EMBEDDINGS)
    with host_syncs(page_locked) as seen:
        h.worker._apply_adapters({two})
        h.worker._apply_adapters({one})
        h.manager._load(0, both)
    assert seen == []
