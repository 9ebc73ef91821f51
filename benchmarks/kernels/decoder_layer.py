"""What the benchmark times: one decoder layer's four sites with an adapter, their inputs, and the
base layer's products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    activated_lora,
    begin,
    extended_linear,
    finish_,
    gated_lora_,
    gated_lora_reference,
    prefetch,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.backends.triton.glu import glu
from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS, SHARE, fits
from vllm_lora_ext.kernels.gated_lora.reference import TOLERANCE
from vllm_lora_ext.routing import GateSpec, InputNorm, Rescale

# Model, tensor parallel size → K and the slices' N of the four sites, of one rank.
MODELS: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "llama-3.1-8b": (
        (4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)),
    ),
    "qwen3-4b": (
        (2560, (4096, 1024, 1024)), (4096, (2560,)), (2560, (9728, 9728)), (9728, (2560,)),
    ),
    "qwen2.5-32b": (
        (5120, (5120, 1024, 1024)), (5120, (5120,)), (5120, (27648, 27648)), (27648, (5120,)),
    ),
    "qwen2.5-32b-tp4": (
        (5120, (1280, 256, 256)), (1280, (1280,)), (5120, (6912, 6912)), (6912, (1280,)),
    ),
    "tiny": ((64, (48, 16, 16)), (48, (64,)), (64, (80, 80)), (80, (64,))),
}  # fmt: skip
Weights = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An adapter's shape: E experts of rank r, k of them per token."""

    experts: int
    k: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Case:
        first, second, third = text.split("/")
        if first == "rank-wise":  # rank-wise/gates/k: every rank an expert
            return cls(int(second), int(third), 1)
        return cls(int(first), int(second), int(third))

    @property
    def spec(self) -> GateSpec:
        if self.experts == 1:
            return GateSpec()
        return GateSpec(
            source="router", blocks=(self.rank,) * self.experts, score="softmax",
            select="top_k", k=self.k, weight="renormalise",
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        return self.experts * self.rank


@dataclass(frozen=True)
class Part:
    """What one adapter does to one slice."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    gate: GateSpec
    router_GK: torch.Tensor | None
    bias_G: torch.Tensor | None = None
    head_K: torch.Tensor | None = None
    head_bias: float = 0.0
    logit_bias_G: torch.Tensor | None = None
    norm: InputNorm | None = None
    row_start: int = 0
    rescale: Rescale | None = None


class Layer:
    """Four sites with one adapter in slot 0, their inputs and outputs, and the base weights."""

    def __init__(self, model: str, case: Case, routing: str, t: int, step: StepMap) -> None:
        self.dtype = torch.bfloat16 if step.device.type == "cuda" else torch.float32
        self.sites, self.parts, self.x, self.y = [], [], [], []
        for k, sizes in MODELS[model]:
            limits = case.ranks, case.experts
            site = Site(1, k, sizes, *limits, self.dtype, step.device, choice.triton())
            site.step = step
            parts = [self._part(case, k, n, routing, step.device) for n in sizes]
            site.write(0, parts)
            x_TK = torch.randn(t, k, device=step.device)
            x_TK[:, 0] = 1  # carries the skew: see `_part`
            self.sites.append(site)
            self.parts.append(parts)
            self.x.append(x_TK.to(self.dtype))
            self.y.append(torch.zeros(t, sum(sizes), dtype=self.dtype, device=step.device))
        self.numbers = [register_site(site) for site in self.sites]

    def _part(self, case: Case, k: int, n: int, routing: str, device: torch.device) -> Part:
        a_RK = torch.randn(case.ranks, k, device=device).to(self.dtype) / k**0.5
        b_NR = torch.randn(n, case.ranks, device=device).to(self.dtype)
        if case.experts == 1:
            return Part(a_RK, b_NR, case.spec, None)
        router_GK = torch.randn(case.experts, k, device=device) / k**0.5
        falling_G = torch.arange(case.experts, device=device).float()
        router_GK[:, 0] = {"uniform": 0.0, "skewed": -0.4, "one-hot": -40.0}[routing] * falling_G
        return Part(a_RK, b_NR, case.spec, router_GK)

    def run(self) -> None:
        for number, x_TK, y_TN in zip(self.numbers, self.x, self.y, strict=True):
            gated_lora_(y_TN, x_TK, number)

    def run_with_base(self, weights: Weights) -> None:
        """The base layer's products, each followed by both launches."""
        for number, x_TK, w_NK in zip(self.numbers, self.x, weights, strict=True):
            _with_base(x_TK, w_NK, number)

    def run_beside_base(
        self, weights: Weights, side: torch.cuda.Stream, prefetches: bool = False
    ) -> None:
        """The same with the first launch on a second stream, beside the product.

        Args:
            prefetches: behind it, what is read after the product is fetched (`prefetch_in_order`).
        """
        here = torch.cuda.current_stream()
        for site, x_TK, w_NK in zip(self.sites, self.x, weights, strict=True):
            side.wait_stream(here)
            y_TN = torch.mm(x_TK, w_NK.t())
            with torch.cuda.stream(side):
                u_PTR = begin(x_TK, site)
                if prefetches:
                    prefetch(x_TK, site)
            here.wait_stream(side)
            finish_(y_TN, x_TK, u_PTR, site)

    def extended(self, weights: Weights, share: float = SHARE) -> Callable[[], None] | None:
        """As `run_with_base`, with A and routers below the base weights of the sites where that
        pays: there one product and one launch. None: it pays at no site.

        Raises:
            SystemExit: its results are wrong.
        """
        calls: list[Callable[[], torch.Tensor]] = []
        sites: list[Site] = []
        for number, old, parts, x_TK, w_NK in zip(
            self.numbers, self.sites, self.parts, self.x, weights, strict=True
        ):
            limits, two = (
                (old.max_rank, old.max_router_rows),
                partial(_with_base, x_TK, w_NK, number),
            )
            calls.append(two)
            if len(x_TK) > MOST_ROWS or not fits(w_NK, 1, len(parts), *limits, share):
                continue
            site = Site(1, x_TK.shape[1], old.slice_sizes, *limits, w_NK.dtype, w_NK.device,
                        choice.triton(), base_NK=w_NK)  # fmt: skip
            assert site.extension is not None
            site.extension.base_NK.copy_(w_NK)
            site.step = old.step
            site.write(0, parts)
            sites.append(site)  # ops know them by number, and keep none
            calls[-1] = partial(extended_linear, x_TK, None, register_site(site), len(w_NK))
            got_TN, want_TN = calls[-1]().float(), two().float()
            error = float((got_TN - want_TN).norm() / want_TN.norm())
            if not error < TOLERANCE[w_NK.dtype]:
                raise SystemExit(f"rows below the base weight: wrong by {error:.2e}; no times")

        def run(_sites: list[Site] = sites) -> None:
            for call in calls:
                call()

        return run if sites else None

    def gate_up(self, weights: Weights, fused: bool) -> Callable[[], torch.Tensor]:
        """Product, both launches and activation of gate and up: the last two in one, or apart.

        Raises:
            SystemExit: the results of one are wrong.
        """
        site, old, x_TK, w_NK = self.sites[2], self.numbers[2], self.x[2], weights[2]
        inner = site.slice_sizes[0]
        k, limits = x_TK.shape[1], (site.max_rank, site.max_router_rows)
        own = Site(1, k, site.slice_sizes, *limits, self.dtype, x_TK.device, choice.triton())
        own.step, own.activation = site.step, "silu"
        if fused:
            own.write(0, self.parts[2])
        else:  # the same launch, with nothing to add
            own.step = StepMap(len(x_TK), x_TK.device, tiled=True)
        handle = register_site(own)

        def run(own: Site = own) -> torch.Tensor:  # ops know it by number, and keep none
            y_TN = torch.mm(x_TK, w_NK.t())
            if not fused:
                gated_lora_(y_TN, x_TK, old)
                a_TI = y_TN.new_empty(len(y_TN), inner)
                glu(a_TI, y_TN, None, own)
                return a_TI
            return activated_lora(y_TN, x_TK, handle, inner)

        gate_TI, up_TI = _with_base(x_TK, w_NK, old).float().chunk(2, dim=1)
        want_TI = torch.nn.functional.silu(gate_TI) * up_TI
        error = float((run().float() - want_TI).norm() / want_TI.norm())
        if not error < TOLERANCE[w_NK.dtype]:
            raise SystemExit(f"gate and up, activated: wrong by {error:.2e}; no times")
        return run

    def error(self) -> float:
        """Largest relative error of a site, in norm. y must be zero before."""
        worst = 0.0
        slots_T = torch.zeros(len(self.x[0]), dtype=torch.long, device=self.x[0].device)
        self.run()
        for site, parts, x_TK, y_TN in zip(self.sites, self.parts, self.x, self.y, strict=True):
            want = gated_lora_reference(x_TK, slots_T, [parts], site.slice_sizes)
            error = float((y_TN.float() - want).norm() / want.norm())
            worst = max(worst, error if error == error else float("inf"))
        return worst

    @property
    def bytes(self) -> int:
        sites = [b.nbytes for s in self.sites for b in (s.a_SRK, s.store.b_SRN, s.router_SGK)]
        return sum(sites) + sum(t.nbytes for t in (*self.x, *self.y))


def _with_base(x_TK: torch.Tensor, w_NK: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    y_TN = torch.mm(x_TK, w_NK.t())
    gated_lora_(y_TN, x_TK, number)
    return y_TN
