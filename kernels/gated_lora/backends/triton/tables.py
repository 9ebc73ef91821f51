"""SlotTables: what the GPU kernels read about each slot, at addresses that never change.

A slot is one row of int32 and one row of float32 numbers, so that loading an adapter costs two
small copies. All that a `GateSpec` says per gate is spelled out per *rank*: a rank knows the
column of its logit, the first rank of its gate, the column of its A x, and its bias. The kernels
then need no notion of blocks, of a shared A, or of where the logits come from.

    ints     rows of A in use, rows of routers in use,
             then per slice: `SPEC`, and three vectors over ranks (logit column, first rank of
             the same gate, A x column)
    floats   per slice: `VALUES`, and the bias over ranks

Zeros everywhere mean that the slot adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from vllm_lora_ext.routing.spec import Bias, Score, Select, Weight

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.plan import Shape, SlicePlan

SPEC = (
    "ranks", "gated", "score", "bias", "select", "by_magnitude", "picks", "head", "subtract",
    "weight", "masked",
)  # fmt: skip
VALUES = (
    "score_temperature", "threshold", "head_bias", "top_p", "temperature", "mask_below", "constant",
)  # fmt: skip
COUNTS = 2  # ints before the first slice's
SCORES, BIASES = get_args(Score), get_args(Bias)
SELECTS, WEIGHTS = get_args(Select), get_args(Weight)


class SlotTables:
    """Device tables of one site.

    Args:
        slice_sizes: N of each slice, y_start: first column of y that this rank adds to.
    Attributes:
        ints_SI: [slots, COUNTS + slices * (len(SPEC) + 3 * max_rank)] int32.
        floats_SF: [slots, slices * (len(VALUES) + max_rank)] float32.
        columns_S2: [slices, 2] int32, first column of a slice in B, and its size.
    """

    def __init__(
        self,
        num_slots: int,
        slice_sizes: Sequence[int],
        max_rank: int,
        device: torch.device | str,
    ) -> None:
        self.max_rank, self.num_slices = max_rank, len(slice_sizes)
        self.slice_ints = len(SPEC) + 3 * max_rank
        self.slice_floats = len(VALUES) + max_rank
        ints = COUNTS + self.num_slices * self.slice_ints
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
        ints_np[:COUNTS] = a_rows, router_rows
        for i, p in plans:
            at = COUNTS + i * self.slice_ints
            ints_np[at : at + self.slice_ints] = self._ints(p)
            at = i * self.slice_floats
            floats_np[at : at + self.slice_floats] = self._floats(p)

    def load(self, slot: int, ints: torch.Tensor, floats: torch.Tensor) -> None:
        """Copies what `describe` filled into a slot."""
        self.floats_SF[slot].copy_(floats, non_blocking=True)
        self.ints_SI[slot].copy_(ints, non_blocking=True)

    def _ints(self, p: SlicePlan) -> np.ndarray:
        gate, ranks = p.gate, p.bt_RN.shape[0]
        # Keeping every gate needs no search: select 'all'.
        keeps_all = gate.select == "top_k" and gate.k == gate.num_gates
        search = {"top_k": gate.k, "top_p": gate.num_gates}.get(gate.select, 0)
        spec = {
            "ranks": ranks,
            "gated": gate.source != "none",
            "score": SCORES.index(gate.score),
            "bias": BIASES.index(gate.bias),
            "select": SELECTS.index("all" if keeps_all else gate.select),
            "by_magnitude": gate.key == "abs",
            "picks": 0 if keeps_all else search,
            "head": p.head_at if gate.threshold_head else -1,
            "subtract": gate.subtract_threshold,
            "weight": WEIGHTS.index(gate.weight),
            "masked": gate.mask_below is not None,
        }
        vectors = np.zeros((3, self.max_rank), dtype=np.int32)
        if gate.source != "none" and ranks:  # a block's router stands at a slice without experts
            gate_of_R = _gate_of(gate.blocks)
            own = gate.source != "self"
            vectors[0, :ranks] = (p.router_start if own else p.a_start) + gate_of_R
            vectors[1, :ranks] = np.searchsorted(gate_of_R, gate_of_R)
        vectors[2, :ranks] = p.a_start + np.arange(ranks) % max(p.a_stop - p.a_start, 1)
        return np.concatenate([[spec[name] for name in SPEC], vectors.ravel()])

    def _floats(self, p: SlicePlan) -> np.ndarray:
        gate = p.gate
        values = {
            "score_temperature": gate.score_temperature,
            "threshold": gate.threshold,
            "head_bias": p.head_bias,
            "top_p": gate.top_p,
            "temperature": gate.temperature,
            "mask_below": gate.mask_below or 0.0,
            "constant": gate.constant,
        }
        bias = np.zeros(self.max_rank, dtype=np.float32)
        if p.bias_G is not None:
            bias[: p.bt_RN.shape[0]] = p.bias_G.cpu().numpy()[_gate_of(gate.blocks)]
        return np.concatenate([[values[name] for name in VALUES], bias])


def _gate_of(blocks: Sequence[int]) -> np.ndarray:
    """Gate of each rank."""
    return np.repeat(np.arange(len(blocks)), blocks)
