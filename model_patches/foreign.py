"""LoRA models that came out of vLLM's `_load_adapter`, taken into host memory.

Target: none; `LRUCacheWorkerLoRAManager._load_adapter` stays where it is. Reinforcement-learning
frameworks replace it on the class, so that their requests bring tensors in place of a folder. What
such a function returns is a stock `LoRAModel`: it passes our checks, and is held as every plain
LoRA is, formed by our rules where we know all its layers, else by stock's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_lora_ext.adapters.checks import check_adapter
from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.adapters.model import FusedExperts, Head, RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.placing import Placer
from vllm_lora_ext.model_patches.residency import HostAdapter

_STOCK = ("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter")


def is_foreign(request: LoRARequest) -> bool:
    """Whether a request is for whoever replaced vLLM's own `_load_adapter`: one of another kind
    than vLLM's, or that names no folder."""
    load: Any = LRUCacheWorkerLoRAManager._load_adapter
    if (getattr(load, "__module__", ""), getattr(load, "__qualname__", "")) == _STOCK:
        return False
    return type(request) is not LoRARequest or not os.path.isdir(request.lora_path)


def host_form(lora: LoRAModel, placer: Placer, max_rank: int) -> HostAdapter:
    """The model for our slots; whoever has made it keeps its tensors as they are.

    Raises:
        AdapterError: as for an adapter that was read from a folder; where layers are not known
            here, what `_check_stock` and `Placer.place_formed` raise.
    """
    version = digest_of(lora)
    adapter = _adapter(lora, placer, version)
    if adapter is not None:
        check_adapter(adapter)
        return placer.place(adapter, renamed=True)
    _check_stock(lora, placer, max_rank)
    for w in filter(_is_linear, lora.loras.values()):  # stock would do it in place
        w.lora_b, w.scaling = w.lora_b * w.scaling, 1.0
    placer.lane.form(lora)
    return placer.place_formed(lora, version)


def _adapter(lora: LoRAModel, placer: Placer, version: str) -> RoutedAdapter | None:
    """The model as we read one from a folder; None when it has parts that only stock can form."""
    fused = placer.lane.by_parameter(lora.loras)
    linear = {name: w for name, w in lora.loras.items() if name not in fused}
    if not all(map(_is_linear, lora.loras.values())) or not all(map(placer.knows, linear)):
        return None
    modules = {
        name: RoutedModule(
            w.lora_a, w.lora_b.float() * w.scaling,
            kind="embedding" if placer.is_embedding(name) else "linear",
        )
        for name, w in linear.items()
    }  # fmt: skip
    return RoutedAdapter(
        modules,
        system="plain",
        digest=version,
        heads={name: Head(m.weight, m.bias) for name, m in lora.modules_to_save.items()},
        experts={
            parameter: FusedExperts(
                lora.loras[name].lora_a,
                lora.loras[name].lora_b.float() * lora.loras[name].scaling,
                placer.lane.experts[parameter].count,
            )
            for name, parameter in fused.items()
        },
    )


def _check_stock(lora: LoRAModel, placer: Placer, max_rank: int) -> None:
    """What must hold of a model before stock forms it for the layers.

    Raises:
        AdapterError: `unknown_module`, no layer is known here; `rank_too_large`; `not_finite`.
    """
    if not any(map(placer.wraps, lora.loras)):
        raise AdapterError(
            "unknown_module", "the adapter adapts no layer that this model has",
            seen=min(lora.loras), fix="serve it with the model it was trained on",
        )  # fmt: skip
    if lora.rank > max_rank:
        raise AdapterError(
            "rank_too_large", "the adapter has too large a rank", seen=lora.rank,
            limit=f"--max-lora-rank {max_rank}", fix="start with a larger --max-lora-rank",
        )  # fmt: skip
    for name, tensor in _tensors(lora):
        if not is_finite(tensor):
            raise not_finite(name, tensor)


def digest_of(lora: LoRAModel) -> str:
    """sha256 over a model's tensors."""
    digest = sha256()
    for name, tensor in _tensors(lora):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)} "
        digest.update(sha256(head.encode()).digest() + sha256(data.data).digest())
    return digest.hexdigest()


def _is_linear(w: LoRALayerWeights) -> bool:
    return all(isinstance(t, torch.Tensor) and t.ndim == 2 for t in (w.lora_a, w.lora_b))


def _tensors(lora: LoRAModel) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors by what they are, in an order of their own; scales are told by B."""
    for name, w in sorted(lora.loras.items()):
        for part, value in (("A", w.lora_a), ("B", w.lora_b)):
            for i, tensor in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(tensor, torch.Tensor):
                    yield f"{part} {i} of {name} times {w.scaling}", tensor
    for name, full in sorted(lora.modules_to_save.items()):
        yield f"weight of {name}", full.weight
        if full.bias is not None:
            yield f"bias of {name}", full.bias
