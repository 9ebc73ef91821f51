"""SlotTables: what the GPU kernels read about each slot, at addresses that never change.

A slot is one row of int32 and one row of float32 numbers, so that loading an adapter costs two
small copies. All that a `GateSpec` says per gate is spelled out per *rank*: a rank knows the
column of its logit, the first rank of its gate, the column of its A x, and its biases. The kernels
then need no notion of blocks, of a shared A, or of where the logits come from. The ranks of a slice
may have several gate tables one after the other, those of several adapters in one slot.

    ints     `COUNTS`, then per slice: `SLICE`, a vector over ranks for each of `RANK_INTS`, and
             `SPEC` for each gate table
    floats   per slice: a vector over ranks for each of `RANK_FLOATS`, and `VALUES` for each gate
             table

Kernels know the places by the names of `names.py`.

Zeros everywhere mean that the slot adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.codes import BIASES, SCORES, SELECTS, WEIGHTS
from vllm_lora_ext.kernels.gated_lora.plan import MAX_GATES, Shape, SlicePlan
from vllm_lora_ext.routing import GateSpec

# Rows in use, whether a router reads a normalised x, and rows of B if no gate chooses among them.
COUNTS = ("a_rows", "router_rows", "reads_norm", "b_rows")
SLICE = ("ranks", "gates", "factors", "rescaled")
# Column of the rank's logit, first rank of its gate, columns of its A x and of its factor.
RANK_INTS = ("logit", "first", "ax", "factor")
# Bias, bias of the logit, sum of the router's row, the constant input's part of the logit.
RANK_FLOATS = ("bias", "logit_bias", "row_sum", "tail")
# start, stop: the ranks that one gate table is for.
SPEC = (
    "start", "stop", "score", "bias", "select", "by_magnitude", "picks", "head", "subtract",
    "weight", "masked", "given", "affine", "product",
)  # fmt: skip
VALUES = (
    "score_temperature", "threshold", "head_bias", "top_p", "temperature", "mask_below", "constant",
    "width", "tail_sum", "tail_squares", "normalise_eps",
)  # fmt: skip
AFFINE = ("none", "bias", "normalised")  # what becomes of a router's logits before their score


class SlotTables:
    """Device tables of one site.

    Args:
        slice_sizes: N of each slice, y_start: first column of y that this rank adds to.
        gates: most gate tables of a slice.
    Attributes:
        ints_SI: [slots, len(COUNTS) + slices * slice_ints(max_rank, gates)] int32.
        floats_SF: [slots, slices * slice_floats(max_rank, gates)] float32.
        columns_S2: [slices, 2] int32, first column of a slice in B, and its size.
    """

    def __init__(
        self,
        num_slots: int,
        slice_sizes: Sequence[int],
        max_rank: int,
        device: torch.device | str,
        gates: int = MAX_GATES,
    ) -> None:
        self.max_rank, self.num_slices = max_rank, len(slice_sizes)
        self.slice_ints = slice_ints(max_rank, gates)
        self.slice_floats = slice_floats(max_rank, gates)
        ints = len(COUNTS) + self.num_slices * self.slice_ints
        self.ints_SI = torch.zeros(num_slots, ints, dtype=torch.int32, device=device)
        self.floats_SF = torch.zeros(
            num_slots, self.num_slices * self.slice_floats, dtype=torch.float32, device=device
        )
        starts = np.cumsum((0, *slice_sizes))[:-1]
        columns = np.stack([starts, np.asarray(slice_sizes)], axis=1).astype(np.int32)
        self.columns_S2 = torch.from_numpy(columns).to(device)

    def clear(self, slot: int) -> None:
        """The slot adds nothing any more."""
        self.ints_SI[slot].zero_()

    def shapes(self) -> list[Shape]:
        """Of one slot's rows, as `describe` fills them."""
        return [((row.shape[1],), row.dtype) for row in (self.ints_SI, self.floats_SF)]

    def describe(
        self,
        a_rows: int,
        router_rows: int,
        plans: Iterable[tuple[int, SlicePlan]],
        ints: torch.Tensor,
        floats: torch.Tensor,
    ) -> None:
        """Fills one slot's rows, in host memory, for one adapter: its rows in use, and (number,
        plan) of each slice it touches."""
        ints_np, floats_np = ints.numpy(), floats.numpy()
        ints_np.fill(0)
        floats_np.fill(0)
        of_slice: dict[int, list[SlicePlan]] = {}
        for i, p in plans:
            of_slice.setdefault(i, []).append(p)
        normalised = any(p.norm is not None for ps in of_slice.values() for p in ps)
        ints_np[: len(COUNTS)] = a_rows, router_rows, normalised, _whole_b(of_slice.values())
        for i, ps in of_slice.items():
            self._slice(
                ints_np[len(COUNTS) + i * self.slice_ints :][: self.slice_ints],
                floats_np[i * self.slice_floats :][: self.slice_floats], ps,
            )  # fmt: skip

    def load(self, slot: int, ints: torch.Tensor, floats: torch.Tensor) -> None:
        """Copies what `describe` filled into a slot."""
        self.floats_SF[slot].copy_(floats, non_blocking=True)
        self.ints_SI[slot].copy_(ints, non_blocking=True)

    def _slice(self, ints: np.ndarray, floats: np.ndarray, plans: Sequence[SlicePlan]) -> None:
        """Fills the rows' part of one slice."""
        ints_R = ints[len(SLICE) :][: len(RANK_INTS) * self.max_rank].reshape(len(RANK_INTS), -1)
        floats_R = floats[: len(RANK_FLOATS) * self.max_rank].reshape(len(RANK_FLOATS), -1)
        logit_R, first_R, ax_R, factor_R = ints_R
        specs = ints[len(SLICE) + ints_R.size :].reshape(-1, len(SPEC))
        values = floats[floats_R.size :].reshape(-1, len(VALUES))
        gates = 0
        for p in plans:
            ranks = len(p.bt_RN)
            own = slice(p.b_start, p.b_start + ranks)
            rows = p.a_stop - p.a_start
            if p.gate.product:  # of its first expert; the kernel counts on from there
                rows = p.gate.blocks[0]
            ax_R[own] = p.a_start + np.arange(ranks) % max(rows, 1)
            factor_R[own] = p.factor_at
            if p.gate.source == "none" or not ranks:  # a block's router, where it has no experts
                continue
            gate_of_R = _gate_of(p.gate.blocks)
            logit_R[own] = _first_logit(p) + gate_of_R
            first_R[own] = p.b_start + np.searchsorted(gate_of_R, gate_of_R)
            for row, of_G in enumerate(_per_gate(p)):
                floats_R[row, own] = 0 if of_G is None else of_G.cpu().numpy()[gate_of_R]
            specs[gates], values[gates] = _spec(p), _values(p)
            gates += 1
        total = max(p.b_start + len(p.bt_RN) for p in plans)
        rescaled = any(p.rescale is not None for p in plans)
        ints[: len(SLICE)] = total, gates, any(p.factor_at >= 0 for p in plans), rescaled


def slice_ints(max_rank: int, gates: int) -> int:
    """Ints of a slice in a slot's row."""
    return len(SLICE) + len(RANK_INTS) * max_rank + gates * len(SPEC)


def slice_floats(max_rank: int, gates: int) -> int:
    """Floats of a slice in a slot's row."""
    return len(RANK_FLOATS) * max_rank + gates * len(VALUES)


def _whole_b(plans: Iterable[Sequence[SlicePlan]]) -> int:
    """Rows of B, of the slice that has most, that every step with the slot reads; 0 where a gate
    chooses among them."""
    every = [p for of_slice in plans for p in of_slice]
    if any(_select(p.gate) != "all" or p.gate.mask_below is not None for p in every):
        return 0
    return max((p.b_start + len(p.bt_RN) for p in every), default=0)


def _select(gate: GateSpec) -> str:
    """Keeping every gate needs no search: select 'all'."""
    keeps_all = gate.select == "top_k" and gate.k == gate.num_gates
    return "all" if keeps_all else gate.select


def _first_logit(p: SlicePlan) -> int:
    """Column of the first gate's logit: of u, or of the numbers that come with a row."""
    if p.gate.columns:
        return p.row_start
    return p.a_start if p.gate.source == "self" else p.router_start


def _per_gate(p: SlicePlan) -> tuple[torch.Tensor | None, ...]:
    norm = p.norm
    sums, tail = (None, None) if norm is None else (norm.row_sums_G, norm.tail_G)
    return p.bias_G, p.logit_bias_G, sums, tail


def _spec(p: SlicePlan) -> list[int]:
    gate = p.gate
    select = _select(gate)
    affine = "bias" if p.logit_bias_G is not None else "none"
    spec = {
        "start": p.b_start,
        "stop": p.b_start + len(p.bt_RN),
        "score": SCORES.index(gate.score),
        "bias": BIASES.index(gate.bias),
        "select": SELECTS.index(select),
        "by_magnitude": gate.key == "abs",
        "picks": {"top_k": gate.k, "top_p": gate.num_gates}.get(select, 0),
        "head": p.head_at if gate.threshold_head else -1,
        "subtract": gate.subtract_threshold,
        "weight": WEIGHTS.index(gate.weight),
        "masked": gate.mask_below is not None,
        "given": gate.columns > 0,
        "affine": AFFINE.index(affine if p.norm is None else "normalised"),
        "product": gate.product * gate.blocks[0],
    }
    return [int(spec[name]) for name in SPEC]


def _values(p: SlicePlan) -> list[float]:
    gate, norm = p.gate, p.norm
    values = {
        "score_temperature": gate.score_temperature,
        "threshold": gate.threshold,
        "head_bias": p.head_bias,
        "top_p": gate.top_p,
        "temperature": gate.temperature,
        "mask_below": gate.mask_below or 0.0,
        "constant": gate.constant,
        "width": 1.0 if norm is None else norm.width,
        "tail_sum": 0.0 if norm is None else norm.tail_sum,
        "tail_squares": 0.0 if norm is None else norm.tail_squares,
        "normalise_eps": gate.normalise_eps,
    }
    return [values[name] for name in VALUES]


def _gate_of(blocks: Sequence[int]) -> np.ndarray:
    """Gate of each rank."""
    return np.repeat(np.arange(len(blocks)), blocks)
