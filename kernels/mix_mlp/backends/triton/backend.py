"""The GPU's blocks: one launch more than their two linears have anyway (`mix`).

What the launches hand on lies in two buffers that all blocks of an engine share (`Scratch`), since
blocks run one after the other; they are arguments of the ops (`op`), so the compiler sees who
writes and who reads them, and a captured graph finds them where they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import parts_in, parts_size
from vllm_lora_ext.kernels.mix_mlp.backends.base import Scratch
from vllm_lora_ext.kernels.mix_mlp.backends.triton import mix
from vllm_lora_ext.kernels.mix_mlp.backends.triton.tables import BlockTables
from vllm_lora_ext.kernels.mix_mlp.backends.triton.warmup import warm

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site
    from vllm_lora_ext.kernels.mix_mlp.block import BlockSite

__all__ = ["make_tables", "mix_", "scratch", "warm"]


def make_tables(first: Site) -> BlockTables:
    return BlockTables(len(first.plans), first.max_rank, first.a_SRK.device)


def scratch(blocks: Sequence[BlockSite], max_tokens: int, dtype: torch.dtype) -> Scratch:
    device = blocks[0].first.a_SRK.device
    sizes = (
        max(parts_size(max_tokens, dtype, site) for site in sites)
        for sites in zip(*((b.first, b.last) for b in blocks), strict=True)
    )
    return Scratch(*(torch.zeros(n, dtype=torch.float32, device=device) for n in sizes))


def mix_(
    a_TI: torch.Tensor,
    z: torch.Tensor,
    gate_up_TN: torch.Tensor,
    u: torch.Tensor,
    block: BlockSite,
) -> None:
    z_PTR, u_PTR = parts_in(z, a_TI, block.last), parts_in(u, gate_up_TN, block.first)
    mix.mix_(a_TI, z_PTR, gate_up_TN, u_PTR, block)
