"""The torch ops of an MLP block: opaque to the compiler, as those of `gated_lora`.

On the PyTorch path `mix_act_` stands between the two linears, which have the ops they always have.
Where the backend has a launch of its own, `block_mix_` does, and what the launches hand on are
arguments of the ops: the first linear's `gated_lora_into_` writes u of `Scratch`, `block_mix_`
reads it and writes z, and the second's completes z. What they launch depends on the step having an
adapter, and on nothing else that the host knows.
"""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch

from vllm_lora_ext.kernels.gated_lora.backends.native import inductor
from vllm_lora_ext.kernels.gated_lora.backends.native import op as cpu_op
from vllm_lora_ext.kernels.mix_mlp.block import BlockSite

_blocks: WeakValueDictionary[int, BlockSite] = WeakValueDictionary()
_numbers = itertools.count(1)


def register_block(block: BlockSite) -> torch.Tensor:
    """The block's handle, as `register_site` gives a site's; valid while the block lives."""
    number = next(_numbers)
    _blocks[number] = block
    cpu_op.watch_block(number, block, block.busy_1)
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _mix_act(a: torch.Tensor, gate_up: torch.Tensor, block: torch.Tensor) -> None:
    found = _blocks[int(block)]
    if found.busy:
        found.mix_act_(a, gate_up)


def _block_mix(
    a: torch.Tensor, z: torch.Tensor, gate_up: torch.Tensor, u: torch.Tensor, block: torch.Tensor
) -> None:
    found = _blocks[int(block)]
    if not found.first.step.active:
        return
    found.backend.mix_(a, z, gate_up, u, found)
    found.mix_act_(a, gate_up)


_lib = torch.library.Library("vllm_lora_ext", "FRAGMENT")
for _name in ("mix_act_", "mix_act_python_"):
    _lib.define(f"{_name}(Tensor(a!) a, Tensor gate_up, Tensor block) -> ()")
cpu_op.python_op("mix_act_", _mix_act)
_lib.impl("mix_act_python_", _mix_act, "CPU")
_lib.impl("mix_act_", _mix_act, "CUDA")
inductor.call_when_active("mix_act_")
torch.library.register_fake("vllm_lora_ext::mix_act_", lambda *_: None, lib=_lib)

_lib.define("block_mix_(Tensor(a!) a, Tensor(b!) z, Tensor gate_up, Tensor u, Tensor block) -> ()")
for _key in ("CPU", "CUDA"):  # on a CPU in Triton's interpreter
    _lib.impl("block_mix_", _block_mix, _key)
torch.library.register_fake("vllm_lora_ext::block_mix_", lambda *_: None, lib=_lib)

mix_act_ = torch.ops.vllm_lora_ext.mix_act_.default
block_mix_ = torch.ops.vllm_lora_ext.block_mix_.default
