"""MixLoRA's MLP block for a batch whose rows use different adapters.

The base gate, up and down run once for every row; only the activation and the low-rank parts are
per expert. Around the base model's own three steps that makes three small ones:

    gate_up_proj   `hold`      u = [A_g; A_u; router] x      kept, nothing is added to the output
    act            `mix_act_`  a = sum_e v_e a_e             replaces act(gate_up) of these rows
    down_proj      `add_down`  y += sum_e v_e B_d A_d a_e
"""

from vllm_lora_ext.kernels.mix_mlp.block import BlockSite
from vllm_lora_ext.kernels.mix_mlp.op import mix_act_, register_block

__all__ = ["BlockSite", "mix_act_", "register_block"]
