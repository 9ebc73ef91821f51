"""Attention over earlier low-rank activations, in plain fp32 PyTorch: the specification.

Our own definition, after the idea of ALoRA (arXiv 2405.17830), whose equations could not be had:

    y_t = W x_t + B (z_t + o_t)        z_t = A x_t                    [R]
    o_t = concat_h sum_{s <= t} softmax_s(q_th · k_sh / sqrt(d)) v_sh  [R], heads h of d = R / H
    [q; k; v]_t = P z_t                                               P [3 R, R]

No positions are added, and nothing is projected after the heads: B is.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def attention_reference(z_TR: torch.Tensor, project_PR: torch.Tensor, heads: int) -> torch.Tensor:
    """o [T, R] fp32.

    Args:
        z_TR: A x of a sequence, from its first token on.
        project_PR: [3 R, R], the rows of q, then of k, then of v; each has its heads in order.
    """
    qkv_TP = z_TR.float() @ project_PR.float().t()
    q_HTD, k_HTD, v_HTD = qkv_TP.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    o_HTD = functional.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, is_causal=True)
    return o_HTD.transpose(0, 1).flatten(1)
