"""The numbers of `codes` and the places of `tables`, as names that kernels read.

And what every kernel begins with: which rows of the step a program works on.
"""

# mypy: allow-untyped-defs
# Kernels take pointers and blocks that have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_lora_ext.kernels.gated_lora import codes, plan
from vllm_lora_ext.kernels.gated_lora.backends.triton import tables


def _place(names: tuple[str, ...], name: str) -> tl.constexpr:
    return tl.constexpr(names.index(name))


SOFTMAX_SCORE = _place(codes.SCORES, "softmax")
SIGMOID_SCORE = _place(codes.SCORES, "sigmoid")
L2_SCORE = _place(codes.SCORES, "l2")
ABS_SCORE = _place(codes.SCORES, "abs")
NO_BIAS, VALUE_BIAS = _place(codes.BIASES, "none"), _place(codes.BIASES, "value")
TOP_K, TOP_P = _place(codes.SELECTS, "top_k"), _place(codes.SELECTS, "top_p")
THRESHOLD = _place(codes.SELECTS, "threshold")
SCORE_WEIGHT = _place(codes.WEIGHTS, "score")
RENORMALISE = _place(codes.WEIGHTS, "renormalise")
SOFTMAX_WEIGHT = _place(codes.WEIGHTS, "softmax")
SQRT_WEIGHT = _place(codes.WEIGHTS, "sqrt")
AS_IT_IS, NORMALISED = _place(tables.AFFINE, "none"), _place(tables.AFFINE, "normalised")

# Of a slot's row.
A_ROWS, ROUTER_ROWS, READS_NORM, B_ROWS = (_place(tables.COUNTS, name) for name in tables.COUNTS)
COUNTS = tl.constexpr(len(tables.COUNTS))
# Of a slice: its header, its vectors over ranks, its gate tables.
RANKS, GATES, FACTORS, RESCALED = (_place(tables.SLICE, name) for name in tables.SLICE)
NUM_SLICE = tl.constexpr(len(tables.SLICE))
LOGIT, FIRST, AX, FACTOR = (_place(tables.RANK_INTS, name) for name in tables.RANK_INTS)
RANK_INTS = tl.constexpr(len(tables.RANK_INTS))
BIAS, LOGIT_BIAS, ROW_SUM, TAIL = (_place(tables.RANK_FLOATS, name) for name in tables.RANK_FLOATS)
RANK_FLOATS = tl.constexpr(len(tables.RANK_FLOATS))
MAX_GATES = tl.constexpr(plan.MAX_GATES)
# Of a gate table.
(
    START, STOP, SCORE, BIAS_KIND, SELECT, BY_MAGNITUDE, PICKS, HEAD, SUBTRACT, WEIGHT, MASKED,
    GIVEN, AFFINE, PRODUCT,
) = (_place(tables.SPEC, name) for name in tables.SPEC)  # fmt: skip
NUM_SPEC = tl.constexpr(len(tables.SPEC))
(
    SCORE_TEMPERATURE, THRESHOLD_VALUE, HEAD_BIAS, TOP_P_VALUE, TEMPERATURE, MASK_BELOW, CONSTANT,
    WIDTH, TAIL_SUM, TAIL_SQUARES, NORMALISE_EPS,
) = (_place(tables.VALUES, name) for name in tables.VALUES)  # fmt: skip
NUM_VALUES = tl.constexpr(len(tables.VALUES))


@triton.jit
def rows_of(tile, tiles_ptr, order_ptr, stride_tiles, num_tokens, BLOCK_T: tl.constexpr):
    """The rows of a tile, all of one slot: places in the order of the step, their start and stop,
    which of them there are, and the rows' numbers. The step may hold more rows than y has."""
    start = tl.load(tiles_ptr + stride_tiles + tile)
    stop = tl.load(tiles_ptr + 2 * stride_tiles + tile)
    at_T = start + tl.arange(0, BLOCK_T)
    ok_T = at_T < stop
    token_T = tl.load(order_ptr + at_T, mask=ok_T, other=0).to(tl.int64)
    return start, stop, at_T, ok_T & (token_T < num_tokens), token_T
