"""DoRA's norms, of the base weights that this worker holds.

Target: none of vLLM's names. The norm of each row of W + B A is computed once, when an adapter is
loaded, beside the steps. Under tensor parallelism a row-parallel layer has a part of every row
here: then what is computed are parts of sums, which the ranks add up when all of them have read the
adapter (`agreement`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_lora_ext.adapters.dora import scale_of, squares
from vllm_lora_ext.adapters.finite import is_finite
from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.plan import PackedSite
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.products import alone
from vllm_lora_ext.routing import Rescale

_COLUMNS = 256  # of a weight that are looked at at once: fp32 copies of whole ones would be large


def begun(slices: Sequence[RoutedModule | None]) -> list[RoutedModule | None]:
    """This rank's slices as they are packed before the norms are known: magnitudes in the place of
    scales, B as it is."""

    def one(module: RoutedModule | None) -> RoutedModule | None:
        if module is None or module.magnitude_N is None:
            return module
        magnitude_N = module.magnitude_N.float()
        rescale = Rescale(magnitude_N, torch.zeros_like(magnitude_N))
        return replace(module, magnitude_N=None, rescale=rescale)

    return [one(module) for module in slices]


def squares_of(
    name: str, layer: RoutedLinear, slices: Sequence[RoutedModule | None]
) -> torch.Tensor | None:
    """Squared norms of the rows of W + B A, [N of all slices] fp32 in host memory, of this rank's
    columns of W; zeros for slices without magnitudes. None where no slice has some.

    Args:
        name: the layer's, for messages.
        slices: of this rank, before `begun`.
    Raises:
        AdapterError: `unsupported_feature`, the base weights are quantised or LoRA is fully
            sharded.
    """
    if not any(module is not None and module.magnitude_N is not None for module in slices):
        return None
    _check(name, layer)
    sums: torch.Tensor | float = 0.0
    for columns, weight_NC in _columns(layer):
        found, start = [], 0
        for module, size in zip(slices, layer.site.slice_sizes, strict=True):
            own_NC, start = weight_NC[start : start + size], start + size
            if module is None or module.magnitude_N is None:
                found.append(own_NC.new_zeros(size, dtype=torch.float32))
            else:
                a_RC, b_NR = (t.to(own_NC.device) for t in (module.a_RK[:, columns], module.b_NR))
                found.append(squares(a_RC, b_NR, own_NC))
        sums = sums + torch.cat(found)
    assert isinstance(sums, torch.Tensor)
    return sums.cpu()


def finish(name: str, layer: RoutedLinear, packed: PackedSite, squares_N: torch.Tensor) -> None:
    """Works the norms into what was packed, in place: B times the scale, the scale, the shift.

    Args:
        squares_N: of all slices, all columns of W.
    Raises:
        AdapterError: `not_finite`, a row of W + B A is zero; `overflow`, B is too large for the
            slots now.
    """
    bias_N = _bias(layer)
    for _, plan in packed.slices:
        if plan.rescale is None:
            continue
        own = slice(plan.y_start, plan.y_stop)
        scale_N = scale_of(name, plan.rescale.scale_N, squares_N[own])
        made = Rescale.of(scale_N, None if bias_N is None else bias_N[own])
        plan.bt_RN.copy_(plan.bt_RN.float() * scale_N)
        if not is_finite(plan.bt_RN):
            raise AdapterError(
                "overflow", f"DoRA's B of {name} has values too large for {plan.bt_RN.dtype}",
                seen=float(scale_N.abs().max()), limit=torch.finfo(plan.bt_RN.dtype).max,
                fix="choose bfloat16 or float32 (--dtype)",
            )  # fmt: skip
        plan.rescale.scale_N.copy_(made.scale_N)
        plan.rescale.shift_N.copy_(made.shift_N)


def finish_all(
    modules: Mapping[str, Any], sites: Mapping[str, PackedSite], norms: Mapping[str, torch.Tensor]
) -> None:
    """`finish` of every layer in `norms`."""
    for name, squares_N in norms.items():
        finish(name, modules[name], sites[name], squares_N)


def _check(name: str, layer: RoutedLinear) -> None:
    method = layer.base_layer.quant_method
    if not isinstance(method, UnquantizedLinearMethod):
        raise AdapterError(
            "unsupported_feature", f"DoRA needs the weights of {name}, and they are quantised",
            seen=type(method).__name__, limit="unquantised base weights",
            fix="serve it with the base model that is not quantised",
        )  # fmt: skip
    if layer.site.fully_sharded:
        raise AdapterError(
            "unsupported_feature", f"DoRA rescales all of the output of {name}, of which a rank has"
            " a part here", seen="--fully-sharded-loras", fix="start without --fully-sharded-loras",
        )  # fmt: skip


@torch.no_grad()
def _columns(layer: RoutedLinear) -> Iterator[tuple[slice, torch.Tensor]]:
    """The base weights, [N, columns] at a time.

    A CPU engine keeps packed ones only, which are read by multiplying with the unit matrix.
    """
    base, width = layer.base_layer, layer.site.a_SRK.shape[2]
    for start in range(0, width, _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, width))
        if base.weight.shape == (sum(layer.site.slice_sizes), width):
            yield columns, base.weight[:, columns]
        else:
            unit_CK = torch.zeros(
                columns.stop - start, width, dtype=base.weight.dtype, device=base.weight.device
            )
            unit_CK.diagonal(start).fill_(1)
            with alone:
                weight_CN = base.quant_method.apply(base, unit_CK, None)
            yield columns, weight_CN.t()


def _bias(layer: RoutedLinear) -> torch.Tensor | None:
    """What this rank adds to the layer's product, in host memory; None: nothing."""
    base = layer.base_layer
    if base.bias is None or base.skip_bias_add or (layer.x_is_shard and layer.tp_rank > 0):
        return None
    bias_N: torch.Tensor = base.bias.detach().float().cpu()
    return bias_N
