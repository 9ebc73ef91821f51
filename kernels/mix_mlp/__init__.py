"""MixLoRA's MLP block for a batch whose rows use different adapters.

The base gate, up and down run once for every row; only the activation and the low-rank parts are
per expert. Around the base model's own three steps that makes three small ones:

    gate_up_proj   `hold`      u = [A_g; A_u; router] x      kept, nothing is added to the output
    act            `mix_act_`  a = sum_e v_e a_e             replaces act(gate_up) of these rows
    down_proj      `add_down`  y += sum_e v_e B_d A_d a_e

On a GPU `block_mix_` stands in the middle, and the linears' own launches do the rest (`op`).
"""

from vllm_lora_ext.kernels.mix_mlp.backends.base import Scratch
from vllm_lora_ext.kernels.mix_mlp.block import BlockSite, scratch_for, warm_blocks
from vllm_lora_ext.kernels.mix_mlp.op import block_mix_, mix_act_, register_block

__all__ = [
    "BlockSite",
    "Scratch",
    "block_mix_",
    "mix_act_",
    "register_block",
    "scratch_for",
    "warm_blocks",
]
