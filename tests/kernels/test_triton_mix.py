"""MixLoRA's block on the Triton kernels against its plain definition.

Compiled where there is a GPU; without one `test_triton` runs this file in Triton's interpreter.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, silu

from tests.kernels.test_mix_mlp import (
    FACTORS_TC,
    GATES,
    TOP2,
    Mlp,
    Slice,
    experts,
    multiplied,
)
from tests.kernels.test_triton import DEVICE, NAN, on_gpu, runs_kernels
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE
from vllm_lora_ext.kernels.gated_lora.step import StepMap
from vllm_lora_ext.kernels.mix_mlp import scratch_for
from vllm_lora_ext.kernels.mix_mlp.backends import eager
from vllm_lora_ext.kernels.mix_mlp.backends.triton import mix as triton_mix
from vllm_lora_ext.kernels.mix_mlp.selfcheck import selfcheck
from vllm_lora_ext.routing.mix import expert_weights, mix_reference

pytestmark = runs_kernels


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    """The PyTorch path would give the right answer too."""

    def never(*_):
        raise AssertionError("the PyTorch path ran")

    monkeypatch.setattr(eager, "mix", never)


def mlp_of(hidden, inner, gated, g, **options):
    mlp = Mlp(hidden, inner, gated, g, **{"device": DEVICE, "backend": choice.triton()} | options)
    for site in mlp.sites:
        site.reserve_routers(site.most_routers)
        site.router_SGK.fill_(NAN)
    return mlp


def undecided(e, x):
    """Rows whose choice of experts hangs on the last bits of the logits."""
    v = expert_weights(e.gate, x.float() @ e.router_GK.t())
    shaken = e.router_GK * (1 + 5e-5 * torch.randn_like(e.router_GK))
    return ((expert_weights(e.gate, x.float() @ shaken.t()) - v).abs() > 1e-2).any(dim=1)


def error(mlp, mine, x, slots, y):
    """Relative, in norm; rows without experts must be those of the base model, bit for bit."""
    act = silu if mlp.gated else gelu
    base = mlp.linears()["down_proj" if mlp.gated else "fc2"]
    x = x.float()
    first = x @ mlp.first_w.t() + mlp.first_b
    wanted, sure = base(mlp.act(first)), torch.ones(len(x), dtype=torch.bool)
    for slot, e in mine.items():
        rows = [i for i, s in enumerate(slots) if s == slot]
        wanted[rows] = mix_reference(e, x[rows], mlp.linears(), act)
        sure[rows] = ~undecided(e, x[rows])
    assert sure.float().mean() > 0.9
    others = [i for i, s in enumerate(slots) if s not in mine]
    if DEVICE == "cpu":
        assert torch.equal(y[others], base(mlp.act(first.to(y.dtype)))[others])
    return ((y.float() - wanted)[sure].norm() / wanted[sure].norm()).item()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", GATES, ids=lambda g: g.get("select", "all") + str(g.get("k", "")))
def test_a_mixed_batch_equals_the_definition(gate, gated):
    g = torch.Generator().manual_seed(7)
    mlp = mlp_of(24, 40, gated, g, biased=False)
    mine = {0: experts(mlp, [3, 3, 3], gate, g), 2: experts(mlp, [2, 5, 1, 4], gate, g)}
    for slot, e in mine.items():
        mlp.write(slot, e)
    assert mlp.block.on_kernels == {0, 2}
    slots = [-1, 0, 2, 2, 0, -1, 2, 0, 1]  # slot 1 holds nothing here
    x = torch.randn(len(slots), 24, generator=g)
    y = mlp.forward(x.to(DEVICE), slots).cpu()
    assert error(to_cpu(mlp), mine, x, slots, y) < TOLERANCE[torch.float32]


def to_cpu(mlp):
    """The base weights back where the definition runs."""
    mlp.first_w, mlp.first_b, mlp.last_w = (
        w.cpu().float() for w in (mlp.first_w, mlp.first_b, mlp.last_w)
    )
    mlp.last_b = None if mlp.last_b is None else mlp.last_b.cpu().float()
    return mlp


def on_cpu(mlp):
    """A copy with its base weights where the definition runs; the one on the device stays."""
    return to_cpu(copy.copy(mlp))


@pytest.mark.parametrize(
    "names", [["gate_proj"], ["up_proj"], ["down_proj"], ["gate_proj", "down_proj"]]
)
def test_experts_on_some_of_the_linears_only(names):
    g = torch.Generator().manual_seed(3)
    mlp = mlp_of(16, 20, True, g)
    e = experts(mlp, [4, 4], TOP2 | {"k": 1}, g, names)
    mlp.write(1, e)
    x = torch.randn(21, 16, generator=g)
    y = mlp.forward(x.to(DEVICE), [1] * 21).cpu()
    assert error(to_cpu(mlp), {1: e}, x, [1] * 21, y) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("names", [None, ["up_proj"], ["down_proj"]])
def test_what_experts_change_is_multiplied(names):
    """By a number of the slot, by one of each row, by both; a graph follows them too."""
    g = torch.Generator().manual_seed(11)
    mlp = mlp_of(24, 40, True, g, biased=False)
    mine = {slot: experts(mlp, [3, 3, 3], TOP2, g, names) for slot in range(4)}
    step, x = StepMap(9, DEVICE, tiled=True), torch.randn(9, 24, generator=g)
    step.set_rows(FACTORS_TC.numpy(), [slice(0, 9)])
    slots = [0, 1, 2, 3, -1, 2, 3, 1, 3]
    mlp.map(step, slots)
    for slot, e in mine.items():
        mlp.write(slot, e)
    run = mlp.run if DEVICE == "cuda" else recorded(mlp, x)
    kinds = [(1.0, None), (-1.5, -1), (1.0, 1), (2.0, 1)]
    for turn in range(2):
        for slot, (scale, at) in enumerate(kinds[turn:] + kinds[:turn]):
            mlp.write(slot, mine[slot], scale, at)
        y = run(x.to(DEVICE)).cpu()
        own, checked = on_cpu(mlp), 0
        for i, slot in enumerate(slots):
            if slot < 0:
                continue
            checked += 1
            scale, at = (kinds[turn:] + kinds[:turn])[slot]
            factor = scale * (FACTORS_TC[i, 1:] if at == 1 else torch.ones(1))
            wanted = multiplied(own, mine[slot], x[i : i + 1], factor)
            error = (y[i : i + 1] - wanted).norm() / wanted.norm()
            assert error < TOLERANCE[torch.float32], (turn, i)
        assert checked == 8  # on a GPU too


@pytest.mark.parametrize("ranks", [[1], [6, 6, 6], [12, 3, 1, 1], [48, 16], [2] * 16])
def test_any_ranks(ranks):
    g = torch.Generator().manual_seed(4)
    mlp = mlp_of(32, 200, True, g)
    e = experts(mlp, ranks, TOP2 | {"k": min(2, len(ranks))}, g)
    mlp.write(3, e)
    slots = [3, -1] * 9
    x = torch.randn(18, 32, generator=g)
    y = mlp.forward(x.to(DEVICE), slots).cpu()
    assert error(to_cpu(mlp), {3: e}, x, slots, y) < TOLERANCE[torch.float32]


def test_routed_linears_and_blocks_in_one_batch_and_cleared_slots():
    g = torch.Generator().manual_seed(5)
    mlp = mlp_of(16, 24, True, g)
    x = torch.randn(6, 16, generator=g)
    base = mlp.forward(x.to(DEVICE), [0] * 6)
    e = experts(mlp, [2, 2], TOP2, g)
    mlp.write(0, e)
    first = mlp.forward(x.to(DEVICE), [0, 0, 1, 0, -1, 0])
    assert torch.equal(first, mlp.forward(x.to(DEVICE), [0, 0, 1, 0, -1, 0]))
    assert torch.equal(first[[2, 4]], base[[2, 4]]) and not torch.allclose(first[0], base[0])
    mlp.block.clear(0)
    assert torch.equal(mlp.forward(x.to(DEVICE), [0] * 6), base)


def test_what_the_kernel_does_not_know_takes_the_pytorch_path():
    g = torch.Generator().manual_seed(5)
    mlp = mlp_of(16, 20, True, g)
    mlp.write(0, experts(mlp, [2, 2], {"score": "softmax", "select": "top_k", "k": 1}, g))
    assert set(mlp.block.plans) == {0}  # its weights scale the second linear's bias
    mlp.block.act_name = "xielu"
    mlp.write(1, experts(mlp, [2, 2], TOP2, g))
    assert set(mlp.block.plans) == {0, 1} and not mlp.block.on_kernels


def recorded(mlp, x):
    """The ops of one run, to be run again: what a captured graph is."""
    return make_fx(lambda x: mlp.run(x))(x)


def compiled(mlp, x):
    """The same through the compiler's functional form, where every change is an argument."""
    run = torch.compile(lambda x: mlp.run(x), backend="aot_eager", fullgraph=True)
    run(x)
    return run


@pytest.mark.skipif(DEVICE == "cuda", reason="a real graph is captured below")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("capture", [recorded, compiled])
def test_a_graph_follows_adapters_that_it_was_not_captured_with(capture, sharded):
    """Captured with a plain adapter, replayed with experts in this slot and in that, then with
    none: all that differs is read from the device's tables."""
    g = torch.Generator().manual_seed(8)
    mlp = mlp_of(24, 40, True, g, biased=False)
    if sharded:  # as a row-parallel layer of one rank
        mlp.sites[1].reduce = torch.clone
    step, x = StepMap(9, DEVICE, tiled=True), torch.randn(9, 24, generator=g)
    plain = Slice(torch.randn(4, 24, generator=g), torch.randn(40, 4, generator=g))
    mlp.sites[0].write(1, [plain, None])
    mlp.map(step, [1] * 9)
    step.frozen = sharded
    graph = capture(mlp, x.clone())
    mlp.sites[0].clear(1)
    e, slots = experts(mlp, [3, 2, 3], TOP2, g), [-1, 0, 2, 2, 0, -1, 2, 0, 1]
    for mine in ({2: e}, {0: e, 2: experts(mlp, [4, 4], TOP2, g)}, {}):
        for slot in (0, 2):
            mlp.write(slot, mine[slot]) if slot in mine else mlp.block.clear(slot)
        step.update(np.array(slots))
        assert error(mlp, mine, x, slots, graph(x.clone())) < TOLERANCE[torch.float32]


def test_two_blocks_one_after_the_other_share_the_scratch():
    g = torch.Generator().manual_seed(9)
    one, two = (mlp_of(24, n, True, g, biased=False) for n in (40, 72))
    one.scratch = two.scratch = scratch_for([one.block, two.block], 9, torch.float32)
    step, x, slots = StepMap(9, DEVICE, tiled=True), torch.randn(9, 24, generator=g), [0, 1, -1] * 3
    for mlp in (one, two):
        mlp.mine = {0: experts(mlp, [3, 2], TOP2, g)}
        mlp.write(0, mlp.mine[0])
        mlp.map(step, slots)
    for mlp in (one, two, one):
        y = mlp.run(x.to(DEVICE)).cpu()
        if DEVICE == "cpu":
            assert error(mlp, mlp.mine, x, slots, y) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "rank", "routers"),
    [(torch.float32, 1, 1), (torch.bfloat16, 64, 64), (torch.float16, 12, 3)],
)
def test_selfcheck_passes(dtype, rank, routers):
    assert selfcheck(DEVICE, dtype, rank, routers) is None


def test_selfcheck_says_what_is_wrong(monkeypatch):
    right = triton_mix.mix_

    def one_row_off(a_TI, *rest):
        right(a_TI, *rest)
        a_TI[2] *= 1.5  # row 2 has experts

    def refused(*_):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(triton_mix, "mix_", one_row_off)
    assert "an MLP block differ" in selfcheck(DEVICE, torch.float32, 8, 8)
    monkeypatch.setattr(triton_mix, "mix_", refused)
    assert selfcheck(DEVICE, torch.float32, 8, 8) == "RuntimeError: out of resource: shared memory"


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("t", [1, 40, 700])
@pytest.mark.parametrize("rank", [64, 128])
def test_sizes_of_a_real_model(t, dtype, rank):
    g = torch.Generator().manual_seed(6)
    mlp = mlp_of(2048, 5632, True, g, dtype=dtype, rank=rank)
    one = TOP2 | {"k": 1}
    mine = {0: experts(mlp, [rank // 8] * 8, TOP2, g), 3: experts(mlp, [16, 8, 8], one, g)}
    for slot, e in mine.items():
        mlp.write(slot, e)
    slots = [(0, 3, -1)[i % 3] for i in range(t)]
    x = torch.randn(t, 2048, generator=g)
    y = mlp.forward(x.to(DEVICE, dtype), slots).float().cpu()
    for e in mine.values():
        for part in e.parts.values():
            part.a_RK, part.b_NR = (w.to(dtype).float() for w in (part.a_RK, part.b_NR))
    mlp, act = to_cpu(mlp), silu
    x = x.to(dtype).float()
    for slot, e in mine.items():
        rows = [i for i, s in enumerate(slots) if s == slot]
        if rows:
            sure = ~undecided(e, x[rows])
            want = mix_reference(e, x[rows], mlp.linears(), act)[sure]
            assert (y[rows][sure] - want).norm() / want.norm() < 2 * TOLERANCE[dtype]


@on_gpu
def test_a_captured_graph_has_the_block():
    g = torch.Generator().manual_seed(8)
    mlp = mlp_of(256, 512, True, g, biased=False)
    step, x = StepMap(24, DEVICE, tiled=True), torch.randn(24, 256, generator=g).to(DEVICE)
    mlp.map(step, [1] * 24)
    mlp.run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mlp.run(x)
    slots = [0, 1, -1, 2] * 6
    for mine in ({2: experts(mlp, [8] * 4, TOP2, g)}, {}):
        mlp.write(2, mine[2]) if mine else mlp.block.clear(2)
        step.update(np.array(slots))
        graph.replay()
        assert torch.equal(y, mlp.run(x))
