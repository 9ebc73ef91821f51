"""How many bytes a slot takes: the formula of what `Site` allocates, without allocating it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton.tables import (
    COUNTS,
    slice_floats,
    slice_ints,
)
from vllm_lora_ext.kernels.gated_lora.plan import MAX_GATES

ROUTER_BYTES = 4  # routers and heads are fp32 everywhere
_TABLE_BYTES = 4  # int32, float32


def slot_bytes(
    in_features: int,
    slice_sizes: Sequence[int],
    max_rank: int,
    router_rows: int,
    dtype: torch.dtype,
    on_cpu: bool,
) -> int:
    """Bytes per slot of a `Site` with the same arguments.

    Args:
        router_rows: what its `reserve_routers` was asked for, 0 without an adapter that routes.
        dtype: of A and B on a GPU; a CPU keeps fp32.
        on_cpu: without the Triton kernels and their tables.
    """
    weight = 4 if on_cpu else dtype.itemsize
    slices = len(slice_sizes)
    a_and_b = weight * max_rank * (slices * in_features + sum(slice_sizes))
    routers = ROUTER_BYTES * router_rows * in_features
    per_slice = slice_ints(max_rank, MAX_GATES) + slice_floats(max_rank, MAX_GATES)
    tables = 0 if on_cpu else _TABLE_BYTES * (len(COUNTS) + slices * per_slice)
    return a_and_b + routers + tables
