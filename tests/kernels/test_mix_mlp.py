"""MixLoRA's block against its plain definition: mixed batches, odd shapes, empty experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, silu

from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    gated_lora_,
    gated_lora_into_,
    register_site,
)
from vllm_lora_ext.kernels.mix_mlp import (
    BlockSite,
    block_mix_,
    mix_act_,
    register_block,
    scratch_for,
)
from vllm_lora_ext.kernels.mix_mlp.backends import eager
from vllm_lora_ext.routing import GateSpec, InputNorm, Rescale
from vllm_lora_ext.routing.mix import mix_reference

NO_GATE = GateSpec()
SLOTS, RANK, ROWS, MOST_ROWS = 4, 64, 16, 700
TOP2 = {"score": "softmax", "select": "top_k", "k": 2, "weight": "renormalise"}
GATES = [
    TOP2,
    {**TOP2, "k": 1},
    {"score": "softmax", "select": "top_p", "top_p": 0.8},
    {"score": "softmax"},
    {"score": "softmax", "select": "threshold", "threshold": 0.3},
]


@dataclass
class Part:
    a_RK: torch.Tensor
    b_NR: torch.Tensor


@dataclass
class Experts:
    gate: GateSpec
    router_GK: torch.Tensor
    parts: dict[str, Part]


@dataclass
class Slice(Part):
    gate: GateSpec = NO_GATE
    router_GK: torch.Tensor | None = None
    bias_G: torch.Tensor | None = None
    head_K: torch.Tensor | None = None
    head_bias: float = 0.0
    logit_bias_G: torch.Tensor | None = None
    norm: InputNorm | None = None
    row_start: int = 0
    rescale: Rescale | None = None


class Mlp:
    """A base MLP and the three steps a server runs around its linears.

    Args:
        rank: most of a slot.
        biased: whether the second linear has a bias; it is scaled by the sum of the weights.
        new: dtype, device and backend of the sites.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        gated: bool,
        g: torch.Generator,
        biased: bool = True,
        rank: int = RANK,
        **new,
    ) -> None:
        new = {"dtype": torch.float32, "device": "cpu"} | new

        def w(*shape: int) -> torch.Tensor:
            w = torch.randn(*shape, generator=g) / shape[-1] ** 0.5
            return w.to(new["device"], new["dtype"])

        self.hidden, self.inner, self.gated = hidden, inner, gated
        self.first_w, self.first_b = w((2 if gated else 1) * inner, hidden), w(1)
        self.last_w, self.last_b = w(hidden, inner), w(hidden) if biased else None
        sizes = (inner, inner) if gated else (inner,)
        self.sites = [
            Site(SLOTS, hidden, sizes, rank, ROWS, **new),
            Site(SLOTS, inner, (hidden,), rank, ROWS, **new),
        ]
        for site in self.sites:  # whatever no adapter wrote must not matter
            site.reserve_routers(site.most_routers)
            for buffer in (site.a_SRK, site.router_SGK, *site.bt_SRN):
                buffer.fill_(float("nan"))
        self.ids = [register_site(site) for site in self.sites]
        name = "silu" if gated else "gelu"
        self.block = BlockSite(*self.sites, self.act, self.last_b, name)
        self.block_id = register_block(self.block)
        self.scratch = scratch_for([self.block], MOST_ROWS, new["dtype"])
        for memory in self.scratch or ():  # what an earlier block left there must not matter
            memory.fill_(float("nan"))

    def act(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return gelu(x)
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    def linears(self):
        def first(x):
            return x @ self.first_w.t() + self.first_b

        def last(x):
            y = x @ self.last_w.t()
            return y if self.last_b is None else y + self.last_b

        if not self.gated:
            return {"fc1": first, "fc2": last}
        return {
            "gate_proj": lambda x: first(x)[:, : self.inner],
            "up_proj": lambda x: first(x)[:, self.inner :],
            "down_proj": last,
        }

    def write(
        self, slot: int, experts: Experts, scale: float = 1.0, factor_at: int | None = None
    ) -> None:
        """Puts experts into a slot; with `factor_at`, what they change is multiplied."""

        def zero(n: int) -> Part:
            return Part(torch.zeros(0, self.hidden), torch.zeros(n, 0))

        names = ["gate_proj", "up_proj"] if self.gated else ["fc1"]
        parts = [experts.parts.get(name, zero(self.inner)) for name in names]
        slices = [Slice(p.a_RK, p.b_NR) for p in parts]
        slices[0].gate, slices[0].router_GK = experts.gate, experts.router_GK
        down = experts.parts.get("down_proj" if self.gated else "fc2")
        block = self.block
        packed = block.pack(experts.gate, slices, down and Slice(down.a_RK, down.b_NR))
        if factor_at is not None:
            shapes = block.tables.scaled_shapes()
            out = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
            packed = block.scaled(packed, scale, factor_at, out)
        block.clear(slot)
        block.load(slot, packed)

    def map(self, step: StepMap, slots: list[int]) -> None:
        """The rows of the step at hand."""
        step.update(np.array(slots))
        for site in self.sites:
            site.step = step

    def forward(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        self.map(StepMap(len(x), x.device, tiled=True), slots)
        return self.run(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The three steps, as a server's layers call them: all that a captured graph holds."""
        scratch = self.scratch
        gate_up = x @ self.first_w.t() + self.first_b
        if scratch is None:
            gated_lora_(gate_up, x, self.ids[0])
        else:
            gated_lora_into_(gate_up, scratch.u, x, self.ids[0])
        a = self.act(gate_up)
        if scratch is None:
            mix_act_(a, gate_up, self.block_id)
        else:
            block_mix_(a, scratch.z, gate_up, scratch.u, self.block_id)
        y = a @ self.last_w.t()
        if self.last_b is not None:
            y += self.last_b
        if scratch is None:
            gated_lora_(y, a, self.ids[1])
        else:
            gated_lora_into_(y, scratch.z, a, self.ids[1])
        return y


def experts(mlp: Mlp, ranks: list[int], gate: dict, g: torch.Generator, names=None) -> Experts:
    total, count = sum(ranks), len(ranks)

    def pair(k: int, n: int) -> Part:
        a = torch.randn(total, k, generator=g) / k**0.5
        return Part(a, torch.randn(n, total, generator=g))

    up, down = (mlp.hidden, mlp.inner), (mlp.inner, mlp.hidden)
    shapes = {"fc1": up, "fc2": down}
    if mlp.gated:
        shapes = {"gate_proj": up, "up_proj": up, "down_proj": down}
    spec = GateSpec(source="router", blocks=tuple(ranks), **gate)
    router = 3 * torch.randn(count, mlp.hidden, generator=g) / mlp.hidden**0.5
    return Experts(spec, router, {n: pair(*shapes[n]) for n in names or shapes})


@pytest.fixture(params=[False, True], ids=["chosen rows", "all rows"])
def rows_of_expert(request, monkeypatch):
    """Which rows an expert computes in PyTorch: those that chose it, or as on a GPU all."""
    if request.param:
        monkeypatch.setattr(eager, "_counts", lambda _: False)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", GATES, ids=lambda g: g.get("select", "all") + str(g.get("k", "")))
def test_a_mixed_batch_equals_the_definition(gate, gated, rows_of_expert):
    g = torch.Generator().manual_seed(7)
    mlp = Mlp(24, 40, gated, g)
    mine = {0: experts(mlp, [3, 3, 3], gate, g), 2: experts(mlp, [2, 5, 1, 4], gate, g)}
    for slot, e in mine.items():
        mlp.write(slot, e)
    slots = [-1, 0, 2, 2, 0, -1, 2, 0, 1]  # slot 1 holds nothing here
    x = torch.randn(len(slots), 24, generator=g)
    y = mlp.forward(x, slots)
    base = mlp.linears()["fc2" if not gated else "down_proj"]
    first = x @ mlp.first_w.t() + mlp.first_b
    wanted = base(mlp.act(first))
    for slot, e in mine.items():
        rows = [i for i, s in enumerate(slots) if s == slot]
        act = silu if gated else gelu
        wanted[rows] = mix_reference(e, x[rows], mlp.linears(), act)
    torch.testing.assert_close(y, wanted, atol=2e-5, rtol=1e-5)
    untouched = [i for i, s in enumerate(slots) if s in (-1, 1)]
    assert torch.equal(y[untouched], base(mlp.act(first))[untouched])


@pytest.mark.parametrize("gated", [True, False])
def test_rows_take_nothing_of_an_expert_that_they_did_not_choose(gated, rows_of_expert):
    """Not even where it overflows."""
    g = torch.Generator().manual_seed(9)
    mlp, x = Mlp(24, 40, gated, g), torch.rand(4, 24, generator=g)
    e = experts(mlp, [3, 3, 3], {**TOP2, "k": 1}, g)
    e.router_GK[1] = -100.0
    wanted = mix_reference(e, x, mlp.linears(), silu if gated else gelu)
    for part in e.parts.values():
        part.b_NR[:, 3:6] = 1e38
    mlp.write(0, e)
    torch.testing.assert_close(mlp.forward(x, [0] * 4), wanted, atol=2e-5, rtol=1e-5)


def multiplied(mlp: Mlp, e: Experts, x: torch.Tensor, factors_T: torch.Tensor) -> torch.Tensor:
    """The definition: base + s (mixed - base)."""
    act = silu if mlp.gated else gelu
    base = mlp.linears()["down_proj" if mlp.gated else "fc2"](
        mlp.act(x @ mlp.first_w.t() + mlp.first_b)
    )
    return base + factors_T[:, None] * (mix_reference(e, x, mlp.linears(), act) - base)


FACTORS_TC = torch.tensor([[9.0, f] for f in (1, 0, -0.5, 2, 1, 0, 0.25, -1, 3)])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gate", [TOP2, {**TOP2, "k": 1}, GATES[-1]], ids=["2", "1", "threshold"])
def test_what_experts_change_is_multiplied(gate, gated):
    """By a number of the slot, by one of each row, by both; beside a slot without."""
    g = torch.Generator().manual_seed(11)
    mlp = Mlp(24, 40, gated, g)
    mine = {slot: experts(mlp, [3, 3, 3], gate, g) for slot in range(4)}
    for slot, (scale, at) in enumerate([(1.0, None), (-1.5, -1), (1.0, 1), (2.0, 1)]):
        mlp.write(slot, mine[slot], scale, at)
    step, x = StepMap(9, tiled=True), torch.randn(9, 24, generator=g)
    step.set_rows(FACTORS_TC.numpy(), [slice(0, 9)])
    each = {0: torch.ones(9), 1: torch.full((9,), -1.5), 2: FACTORS_TC[:, 1]}
    each[3] = 2 * FACTORS_TC[:, 1]
    for slots in ([2] * 9, [0, 1, 2, 3, -1, 2, 3, 1, 3]):
        mlp.map(step, slots)
        y = mlp.run(x)
        for i, slot in enumerate(slots):
            if slot >= 0:
                row = slice(i, i + 1)
                wanted = multiplied(mlp, mine[slot], x[row], each[slot][row])
                torch.testing.assert_close(y[row], wanted, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [["gate_proj"], ["up_proj"], ["down_proj"],
                                   ["gate_proj", "down_proj"]])  # fmt: skip
def test_experts_on_some_of_the_linears_only(names):
    g = torch.Generator().manual_seed(3)
    mlp = Mlp(16, 20, True, g)
    e = experts(mlp, [4, 4], TOP2 | {"k": 1}, g, names)
    mlp.write(1, e)
    x = torch.randn(5, 16, generator=g)
    wanted = mix_reference(e, x, mlp.linears(), silu)
    torch.testing.assert_close(mlp.forward(x, [1] * 5), wanted, atol=2e-5, rtol=1e-5)


def test_one_expert_without_router_choice_is_a_plain_lora_on_three_layers():
    g = torch.Generator().manual_seed(5)
    mlp = Mlp(16, 20, True, g)
    e = experts(mlp, [6], {"score": "softmax"}, g)
    mlp.write(0, e)
    x = torch.randn(4, 16, generator=g)
    lin = mlp.linears()

    def with_lora(name, h):
        return lin[name](h) + h @ e.parts[name].a_RK.t() @ e.parts[name].b_NR.t()

    wanted = with_lora("down_proj", silu(with_lora("gate_proj", x)) * with_lora("up_proj", x))
    torch.testing.assert_close(mlp.forward(x, [0] * 4), wanted, atol=2e-5, rtol=1e-5)


def test_a_cleared_slot_answers_as_the_base_model_again():
    g = torch.Generator().manual_seed(5)
    mlp = Mlp(16, 20, True, g)
    x = torch.randn(4, 16, generator=g)
    before = mlp.forward(x, [0] * 4)
    mlp.write(0, experts(mlp, [2, 2], TOP2, g))
    assert not torch.allclose(mlp.forward(x, [0] * 4), before)
    mlp.block.clear(0)
    assert torch.equal(mlp.forward(x, [0] * 4), before)


def test_ranks_beyond_the_slot_are_refused_and_leave_it_empty():
    g = torch.Generator().manual_seed(5)
    mlp = Mlp(16, 20, True, g)
    with pytest.raises(ValueError, match="rank 66"):
        mlp.write(0, experts(mlp, [33, 33], TOP2, g))
    assert not mlp.block.plans
