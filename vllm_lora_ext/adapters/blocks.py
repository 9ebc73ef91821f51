"""What an MLP block of an adapter means in a model: its activation by name."""

from __future__ import annotations

import torch

from vllm_lora_ext.errors import AdapterError


def activation(name: str) -> torch.nn.Module:
    """The elementwise activation that transformers knows by `name`.

    Raises:
        AdapterError: `bad_value`.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise AdapterError(
            "bad_value", "the adapter's activation is none that transformers knows", seen=name,
            limit="a name such as silu, gelu, gelu_pytorch_tanh",
            fix="remove act_fn from the config: then the model's own is used",
        )  # fmt: skip
    return ACT2FN[name]
