"""Adapters whose A x attends to that of earlier tokens (`routing.attention`): experimental.

Every slice of an adapted linear layer gets one of vLLM's own attention layers, of the shape that
the setting `rank_attention` says, under a name of its own in vLLM's table of layers. So its keys
and values lie in the paged KV cache, in the blocks of the model's own, and prefix cache, chunks and
preemption are those of any layer. Heads that an adapter does not fill are zeros. The attention runs
inside the op that adds B A x, behind it, in steps with rows of such an adapter; rows of others
write zeros, which nobody reads: blocks are known by the content of their adapter.

Targets: `compilation_config.static_forward_context`, from which vLLM takes what has a KV cache, and
`Attention`, which finds its metadata by its name in the forward context.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.selector import get_attn_backend

from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.kernels.gated_lora.plan import SlicePlan
from vllm_lora_ext.model_patches.attention_layers import own_attentions
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.model_patches.residency import Projection, Projections
from vllm_lora_ext.settings import RankAttentionSettings

logger = logging.getLogger("vllm.lora_ext")

NAME = "rank_attention"
"""What the name of such a layer ends with, and which slice it is of."""


# Rows of one slot, what makes their q, k and v, its A and its part of the layer.
_Rows = tuple[slice | torch.Tensor, Projection, torch.Tensor, SlicePlan]


class RankAttention:
    """Of one engine.

    Args:
        model: the served model; layers: its wrapped linear layers, by name.
        step: of its language model.
        shape: what a token's keys of one slice are; vllm_config: the engine's configuration.
    Raises:
        AdapterError: `bad_settings`, no attention backend has such heads, or the model's own layers
            keep something else than keys and values of all tokens.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Any], step: StepMap,
        shape: RankAttentionSettings, vllm_config: Any,
    ) -> None:  # fmt: skip
        self._step, self._shape = step, shape
        own = own_attentions(model, "rank_attention", windows=False)
        self._layers = {
            name: [_layer(f"{name}.{NAME}_{chr(ord('a') + i)}", shape, vllm_config)
                   for i in range(layer.n_slices)]
            for name, layer in layers.items()
            if isinstance(layer, RoutedLinear) and sum(map(str.isdigit, name.split("."))) == 1
        }  # fmt: skip
        self._linears = {name: layers[name] for name in self._layers}
        self._after = {name: _After(self, name) for name in self._layers}
        self._slots: dict[int, Projections] = {}
        every = [layer for found in self._layers.values() for layer in found]
        before, more = (
            sum(spec.page_size_bytes // spec.block_size for spec in (
                layer.get_kv_cache_spec(vllm_config) for layer in group
            )) for group in (own, every)
        )  # fmt: skip
        logger.info(
            "vllm-lora-ext: rank_attention: %d slices of linear layers have a KV cache of %d heads"
            " of %d: a token takes %d bytes of it on this rank, beside %d of the model's own",
            len(every), shape.heads, shape.head_size, more, before,
        )  # fmt: skip

    def check(self, adapter: RoutedAdapter) -> None:
        """That this server's caches hold an adapter's keys and values. Raises AdapterError."""
        shape = self._shape
        for name in adapter.attends:
            sizes = adapter.modules[name].gate.blocks
            if len(sizes) > shape.heads or sizes[0] > shape.head_size:
                most = f"{shape.heads} heads of {shape.head_size}, the setting rank_attention"
                raise AdapterError(
                    "unsupported_feature", f"the attention of {name} is larger than this server's"
                    " cache for it", seen=f"{len(sizes)} heads of {sizes[0]}", limit=most,
                    fix="start the server with a larger one",
                )  # fmt: skip

    def projections(self, layer: str, slices: list[RoutedModule | None]) -> dict[int, Projection]:
        """What an adapter has at a layer, by slice; page-locked where it goes to a GPU, so that no
        step waits for that.

        Raises:
            AdapterError: `unsupported_feature`, the layer has no such cache.
        """
        on_gpu = self._step.device.type == "cuda"
        pin = (lambda t: t.pin_memory()) if on_gpu else (lambda t: t)
        found = {
            i: Projection(pin(module.attention_PR.float()), module.gate.num_gates)
            for i, module in enumerate(slices)
            if module is not None and module.attention_PR is not None
        }
        if found and layer not in self._layers:
            raise AdapterError(
                "unsupported_feature", "an adapter attends to earlier tokens in a layer that has no"
                " cache for it", seen=layer, limit="linear layers of the model's numbered layers",
                fix="adapt others",
            )  # fmt: skip
        return found

    def load(self, slot: int, projections: Projections) -> None:
        """What a slot's adapter has; nothing: none."""
        device = self._step.device
        before = self._slots.pop(slot, {})
        if projections:
            self._slots[slot] = {
                name: {
                    i: Projection(p.weight_PR.to(device, non_blocking=True), p.heads)
                    for i, p in found.items()
                }
                for name, found in projections.items()
            }
        for name in before.keys() | projections.keys():
            site, after = self._linears[name].site, self._after[name]
            wanted = any(name in held for held in self._slots.values())
            if wanted and not after.listens:
                site.listen(after)
            elif after.listens and not wanted:
                site.forget(after)
            after.listens = wanted

    def add_(self, name: str, y_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
        """Adds B o to a layer's output, when B A x has been."""
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or not context.attn_metadata:
            return  # a dummy run
        for i, layer in enumerate(self._layers[name]):
            rows = list(self._rows_at(name, i))
            if rows:
                self._attend_(layer, rows, y_TN, x_TK)

    def _rows_at(self, name: str, i: int) -> Iterator[_Rows]:
        """The step's rows of adapters that attend in a slice of a layer, by slot."""
        site = self._linears[name].site
        for slot, start, stop, index_T in self._step.groups:
            own = self._slots.get(slot, {}).get(name, {}).get(i)
            if own is not None:
                y_start, plan = sum(site.slice_sizes[:i]), site.plans[slot]
                part = next(part for part in plan.slices if part.y_start == y_start)
                a_RK = plan.a_RK[part.a_start : part.a_stop]
                yield slice(start, stop) if index_T is None else index_T, own, a_RK, part

    def _attend_(
        self, layer: Attention, rows: list[_Rows], y_TN: torch.Tensor, x_TK: torch.Tensor
    ) -> None:
        qkv_3THD = x_TK.new_zeros(3, len(x_TK), self._shape.heads, self._shape.head_size)
        for index, own, a_RK, _ in rows:
            z_TR = x_TK[index].float() @ a_RK.float().t()
            mine_T3HD = (z_TR @ own.weight_PR.t()).unflatten(1, (3, own.heads, -1))
            size = mine_T3HD.shape[-1]
            mine_T3HD[:, 0] *= size**-0.5
            qkv_3THD[:, index, : own.heads, :size] = mine_T3HD.transpose(0, 1).to(x_TK.dtype)
        o_THD = layer(*qkv_3THD.flatten(2)).view(qkv_3THD.shape[1:])
        for index, own, _, part in rows:
            size = part.bt_RN.shape[0] // own.heads
            o_TR = o_THD[index, : own.heads, :size].flatten(1).float()
            y_TN[index, part.y_start : part.y_stop] += (o_TR @ part.bt_RN.float()).to(y_TN.dtype)


@dataclass(eq=False)
class _After:
    """What a layer's site calls when its op has run."""

    attention: RankAttention
    name: str
    listens: bool = False

    def __call__(self, y: torch.Tensor, x: torch.Tensor, u: torch.Tensor | None) -> None:
        self.attention.add_(self.name, y, x)


def _layer(name: str, shape: RankAttentionSettings, vllm_config: Any) -> Attention:
    """One of vLLM's, which is bound to its KV cache when vLLM has made it. It scales nothing: that
    is the size of an adapter's own heads."""
    dtype = vllm_config.model_config.dtype
    device = torch.device(vllm_config.device_config.device)
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype), device:
        try:
            backend = get_attn_backend(shape.head_size, dtype, vllm_config.cache_config.cache_dtype)
        except ValueError as error:
            raise _no_backend(shape, str(error).splitlines()[0]) from error
        if not backend.supports_head_size(shape.head_size):
            raise _no_backend(shape, f"{backend.get_name()}: {backend.get_supported_head_sizes()}")
        layer = Attention(
            shape.heads, shape.head_size, 1.0, shape.heads,
            cache_config=vllm_config.cache_config, prefix=name,
        )  # fmt: skip
        layer.process_weights_after_loading(dtype)
    return layer


def _no_backend(shape: RankAttentionSettings, limit: str) -> AdapterError:
    return AdapterError(
        "bad_settings", "no attention backend takes heads of the size that the setting"
        " rank_attention says", seen=shape.head_size, limit=limit, fix="choose another head_size",
    )  # fmt: skip


def apply() -> None:
    """Nothing at start: an engine with the setting makes its own."""
