"""Compiles each variant of the blocks' kernel, as `gated_lora.backends.triton.warmup` does those of
the linears' kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton import warmup
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import num_parts
from vllm_lora_ext.kernels.mix_mlp.backends.triton.mix import mix_

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.mix_mlp.block import BlockSite


def warm(blocks: Iterable[BlockSite], max_tokens: int, dtype: torch.dtype) -> None:
    """Launches every variant once; arguments as those of `gated_lora`'s."""
    for block, t in variants(blocks, max_tokens, dtype):
        first, last = block.first, block.last
        new = first.a_SRK.new_empty
        u_PTR = new(num_parts(t, dtype, first), t, first.num_rows, dtype=torch.float32)
        z_PTR = new(num_parts(t, dtype, last), t, last.num_rows, dtype=torch.float32)
        base_TN = new(t, warmup.widths(first)[1], dtype=dtype)
        a_TI = new(t, warmup.widths(last)[0], dtype=dtype)
        mix_(a_TI, z_PTR, base_TN, u_PTR, block)


def variants(
    blocks: Iterable[BlockSite], max_tokens: int, dtype: torch.dtype
) -> list[tuple[BlockSite, int]]:
    """A block and a number of rows for each number of parts of u, at each shape. The parts of z
    are a number like others."""
    found: dict[object, tuple[BlockSite, int]] = {}
    for block in blocks:
        shape = warmup.shape(block.first), warmup.shape(block.last)
        for t in warmup.steps(max_tokens):
            found.setdefault((shape, num_parts(t, dtype, block.first)), (block, t))
    return list(found.values())
