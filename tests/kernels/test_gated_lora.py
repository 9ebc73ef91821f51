"""The op against its reference: random gates, odd shapes, mixed rows, poisoned buffers."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch

from tests.make_adapters import random_module, random_spec
from vllm_lora_ext.kernels.gated_lora import (
    EmbeddingSite,
    Site,
    StepMap,
    embedding_lora_,
    gated_lora_,
    gated_lora_reference,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.routing import GateSpec

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SLOTS, MAX_RANK = 4, 40


def build(rng, sizes=(13, 7, 7), k=24, specs=None, dtype=torch.float32, poison=True):
    """A site with `SLOTS` slots, three of them filled with random adapters, one left empty."""
    site = Site(SLOTS, k, sizes, MAX_RANK, MAX_RANK, dtype, "cpu")
    if poison:
        site.reserve_routers(site.most_routers)
        for buffer in (site.a_SRK, site.router_SGK, *site.bt_SRN):
            buffer.fill_(float("nan"))
    slots = [[None] * len(sizes) for _ in range(SLOTS)]
    for slot in (0, 1, 3):
        for i, n in enumerate(sizes):
            if specs is not None or rng.random() < 0.8:
                spec = specs[i] if specs else random_spec(rng)
                slots[slot][i] = random_module(rng, k, n, spec)
        site.write(slot, slots[slot])
    site.step = StepMap(64)
    return site, slots


def relative_error(got, want):
    assert torch.isfinite(got).all()
    return ((got - want).norm() / want.norm().clamp_min(1e-9)).item()


def rows(rng, kind, t):
    """Slot of each row: mixed (with base rows and the empty slot), one slot, or base only."""
    if kind == "mixed":
        return np.array([int(rng.integers(-1, SLOTS)) for _ in range(t)])
    return np.full(t, {"one": 3, "base": -1}[kind])


@pytest.mark.parametrize("kind", ["mixed", "one", "base"])
@pytest.mark.parametrize("t", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_equals_reference(seed, dtype, t, kind):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    site, slots = build(rng)
    x_TK, slots_T = torch.randn(t, 24).to(dtype), rows(rng, kind, t)
    site.step.update(slots_T)
    y_TN = torch.zeros(t, 27, dtype=dtype)
    gated_lora_(y_TN, x_TK, register_site(site))
    want = gated_lora_reference(x_TK, torch.tensor(slots_T), slots, (13, 7, 7))
    if kind == "base":
        assert not y_TN.any()
    else:
        assert relative_error(y_TN.float(), want) < TOLERANCE[dtype]
    assert not y_TN[slots_T < 0].any()


def test_narrow_weights_leave_the_logits_alone():
    """In a bf16 site A and B are rounded, routers and threshold heads are not."""
    rng = np.random.default_rng(0)
    gate = GateSpec(
        source="router", score="sigmoid", select="threshold", threshold=0.9,
        threshold_head=True, blocks=(3, 4, 5),
    )  # fmt: skip
    module = random_module(rng, 24, 7, gate)
    site = Site(1, 24, (7,), MAX_RANK, MAX_RANK, torch.bfloat16, "cpu", choice.triton())
    site.write(0, [module])
    plan, x_TK = site.plans[0], torch.randn(5, 24)
    assert (plan.a_RK.dtype, plan.router_GK.dtype) == (torch.bfloat16, torch.float32)
    own_GK = torch.cat([module.router_GK, module.head_K.reshape(1, -1)])
    u_TR = plan.shrink(x_TK)
    assert torch.equal(u_TR[:, plan.num_ranks :], x_TK @ own_GK.t())
    assert relative_error(u_TR[:, : plan.num_ranks], x_TK @ module.a_RK.t()) < 1e-2


def test_mapping_is_read_when_the_op_runs_not_when_it_is_traced():
    """A frozen mapping would answer every request as the adapter of the warm-up."""
    rng = np.random.default_rng(0)
    site, slots = build(rng, sizes=(16,))
    number = register_site(site)

    @torch.compile(backend="eager", fullgraph=True)
    def layer(x_TK):
        y_TN = torch.zeros(x_TK.shape[0], 16)
        gated_lora_(y_TN, x_TK, number)
        return y_TN

    x_TK = torch.randn(5, 24)
    answers = []
    for slot in (0, 3, -1, 1):
        site.step.update(np.full(5, slot))
        answers.append(layer(x_TK))
        want = gated_lora_reference(x_TK, torch.full((5,), slot), slots, (16,))
        torch.testing.assert_close(answers[-1], want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answers[0], answers[1])


def test_a_cleared_or_refused_slot_adds_nothing():
    rng = np.random.default_rng(1)
    site, _ = build(rng, sizes=(16,))
    number, x_TK = register_site(site), torch.randn(3, 24)
    site.step.update(np.array([0, 0, 1]))
    site.clear(0)
    with pytest.raises(ValueError, match="slice 0"):
        site.write(1, [random_module(rng, 23, 16, random_spec(rng))])
    y_TN = torch.zeros(3, 16)
    gated_lora_(y_TN, x_TK, number)
    assert not y_TN.any()


def test_rewriting_a_slot_forgets_the_old_adapter():
    rng = np.random.default_rng(2)
    site, _ = build(rng, sizes=(16,))
    new = random_module(rng, 24, 16, random_spec(rng))
    site.write(0, [new])
    site.step.update(np.zeros(4, dtype=int))
    x_TK, y_TN = torch.randn(4, 24), torch.zeros(4, 16)
    gated_lora_(y_TN, x_TK, register_site(site))
    want = gated_lora_reference(x_TK, torch.zeros(4, dtype=torch.long), [[new]], (16,))
    assert relative_error(y_TN, want) < 2e-5


def test_embedding_adds_columns_of_a_and_skips_base_rows_and_unused_slots():
    torch.manual_seed(0)
    step = StepMap(8)
    site = EmbeddingSite(torch.randn(2, 11, 6), torch.randn(2, 5, 6), step, used={1})
    step.update(np.array([1, -1, 1, 0, 1]))
    ids, y_TN = torch.tensor([3, 4, 10, 2, 3]), torch.zeros(5, 5)
    embedding_lora_(y_TN, ids, register_site(site))
    want = site.a_SVR[1][ids] @ site.b_SNR[1].t()
    want[[1, 3]] = 0
    torch.testing.assert_close(y_TN, want)


def test_step_map_groups_rows_and_marks_padding_as_base():
    step = StepMap(8)
    step.update(np.array([2, 2, -1, 0, 2]))
    assert step.token_slots_T.tolist() == [2, 2, -1, 0, 2, -1, -1, -1]
    found = {g.slot: (g.start, g.stop, None if g.index_T is None else g.index_T.tolist())
             for g in step.groups}  # fmt: skip
    assert found == {0: (3, 4, None), 2: (0, 5, [0, 1, 4])}
    step.update(np.array([], dtype=int))
    assert step.groups == []


def test_routers_take_memory_from_the_first_adapter_on_that_has_some():
    """Slots that are in use keep their routers when a larger one makes the buffer anew."""
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    site = Site(3, 24, (16,), MAX_RANK, MAX_RANK, torch.float32, "cpu")
    number, slots, x_TK = register_site(site), [[None]] * 3, torch.randn(6, 24)
    site.step = StepMap(8)
    site.step.update(np.array([0, 1, 2, 0, 1, 2]))
    seen = []
    for slot, gates in enumerate((0, 3, 9)):
        spec = GateSpec(source="router", blocks=(2,) * gates) if gates else GateSpec()
        slots[slot] = [random_module(rng, 24, 16, spec)]
        site.write(slot, slots[slot])
        y_TN = torch.zeros(6, 16)
        for _ in range(2):  # through Python, then without it
            y_TN.zero_()
            gated_lora_(y_TN, x_TK, number)
        want = gated_lora_reference(x_TK, torch.tensor([0, 1, 2] * 2), slots, (16,))
        assert relative_error(y_TN, want) < 2e-5
        seen.append(site.router_SGK.shape[1])
    assert seen == [0, 3, 9]
    site.reserve_routers(10**6)
    assert site.router_SGK.shape[1] == site.most_routers == MAX_RANK + 1


def pages_in_memory(t: torch.Tensor) -> int:
    """By what the system says of them."""
    start = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    found = (ctypes.c_ubyte * -(-(t.data_ptr() + t.nbytes - start) // mmap.PAGESIZE))()
    length = ctypes.c_size_t(mmap.PAGESIZE * len(found))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), length, found) == 0
    return sum(page & 1 for page in found)


def test_slots_that_are_host_copies_take_no_memory():
    """As they stand, with room for routers, and with adapters in them."""
    site = Site(8, 4096, (4096,), 16, 16, torch.bfloat16, "cpu")
    site.reserve_routers(8), site.reserve_routers(16)
    for slot in range(8):
        site.write(slot, [random_module(np.random.default_rng(slot), 4096, 4096, GateSpec())])
    buffers = site.a_SRK, site.router_SGK, *site.bt_SRN
    assert [pages_in_memory(t) for t in buffers] == [0] * 3
    assert pages_in_memory(torch.zeros_like(site.a_SRK)) >= site.a_SRK.nbytes / mmap.PAGESIZE


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, OSError])
def test_no_room_for_routers_changes_nothing(monkeypatch, error):
    site = Site(3, 24, (16,), MAX_RANK, MAX_RANK, torch.float32, "cpu")

    def full(*_):
        raise error("no room")

    monkeypatch.setattr("vllm_lora_ext.kernels.gated_lora.site.slot_zeros", full)
    with pytest.raises(MemoryError, match="MiB"):
        site.reserve_routers(3)
    assert site.router_SGK.shape[1] == 0
