"""DoRA (arXiv 2402.09353): what magnitudes come to when the base weights are known.

    y = m / n * (W x + B A x) + bias,    n = |W + B A|, the norm of each row

Both factors are constants of adapter and base, so n is computed once: m / n goes into B, and what
is left is a scale of the layer's own output, without its bias.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_lora_ext.adapters.finite import is_finite
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import Rescale


def squares(a_RK: torch.Tensor, b_NR: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """n squared, [N] fp32, of these columns of W and A alone: those of all columns add up."""
    tuned_NK = torch.addmm(weight_NK.float(), b_NR.float(), a_RK.float())
    return tuned_NK.square_().sum(dim=1)


def scale_of(name: str, magnitude_N: torch.Tensor, squares_N: torch.Tensor) -> torch.Tensor:
    """m / n, [N] fp32. Raises AdapterError `not_finite`: a row of the tuned weight is zero."""
    scale_N = magnitude_N.float() / squares_N.sqrt()
    if not is_finite(scale_N):
        raise AdapterError(
            "not_finite", f"a row of W + B A of {name} is zero, and DoRA divides by its norm",
            seen=float(squares_N.min()), fix="serve it with the model it was trained on",
        )  # fmt: skip
    return scale_N


def rescaled(
    name: str, module: RoutedModule, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
) -> RoutedModule:
    """The layer with its magnitudes worked into B and `rescale`; without magnitudes, as it is.

    Args:
        name: for messages.
        weight_NK, bias_N: of the base layer, in any dtype.
    Raises:
        AdapterError: as `scale_of`.
    """
    if module.magnitude_N is None:
        return module
    squares_N = squares(module.a_RK, module.b_NR, weight_NK)
    scale_N = scale_of(name, module.magnitude_N, squares_N)
    b_NR = module.b_NR.float() * scale_N[:, None]
    rescale = Rescale.of(scale_N, bias_N)
    return replace(module, b_NR=b_NR, magnitude_N=None, rescale=rescale)


def refuse_dora(adapter: RoutedAdapter, what: str) -> None:
    """For tools to which an adapter is what it adds to a layer's output.

    Args:
        what: what they do, for the message.
    Raises:
        AdapterError: `unsupported_feature`.
    """
    if adapter.dora:
        raise AdapterError(
            "unsupported_feature", f"the adapter has DoRA's magnitudes: it is no difference that"
            f" can be {what}", seen=adapter.dora[0], limit="adapters that only add to a layer",
            fix="serve it by itself, or make a plain LoRA of it that is near it:"
            " vllm-lora-ext convert --base --rank",
        )  # fmt: skip
