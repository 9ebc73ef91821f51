"""The torch op between an MLP's two linears: opaque to the compiler, as those of `gated_lora`."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

from vllm_lora_ext.kernels.mix_mlp.block import BlockSite

_blocks: WeakValueDictionary[int, BlockSite] = WeakValueDictionary()
_next_id = 0


def register_block(block: BlockSite) -> int:
    """A number by which the op finds the block; valid while the block lives."""
    global _next_id
    _next_id += 1
    _blocks[_next_id] = block
    return _next_id


def _mix_act(a: torch.Tensor, gate_up: torch.Tensor, block: int) -> None:
    found = _blocks[block]
    if found.plans or found.on_kernels:
        found.mix_act_(a, gate_up)


_lib = torch.library.Library("vllm_lora_ext", "FRAGMENT")
_lib.define("mix_act_(Tensor(a!) a, Tensor gate_up, int block) -> ()")
for _key in ("CPU", "CUDA"):
    _lib.impl("mix_act_", _mix_act, _key)
torch.library.register_fake("vllm_lora_ext::mix_act_", lambda *_: None, lib=_lib)

mix_act_ = torch.ops.vllm_lora_ext.mix_act_.default
