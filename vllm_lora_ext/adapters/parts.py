"""Parts of an adapter that are no low-rank layer: trained heads, and LoRA on fused experts.

Only a server holds them, in layers of vLLM's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.adapters.limits import slot_rank
from vllm_lora_ext.adapters.model import FusedExperts, Head, RoutedAdapter
from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class HeadSlot:
    """What a model's classification head takes: weights [1..max_labels, width], and a bias."""

    width: int
    max_labels: int
    bias_dtype: torch.dtype


@dataclass(frozen=True)
class ExpertsSlot:
    """What a parameter of fused experts takes: A [R, width] and B [out, R] for each of `count`."""

    count: int
    width: int
    out: int


def check_parts(adapter: RoutedAdapter) -> None:
    """What must hold of heads and experts, whatever the model.

    Raises:
        AdapterError: `bad_shape`, `rank_mismatch`, `not_finite`.
    """
    for name, head in adapter.heads.items():
        weight, bias = head.weight_NK, head.bias_N
        if weight.ndim != 2 or 0 in weight.shape:
            raise _bad_shape(f"the weight of head {name}", weight, "[labels, in]")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise _bad_shape(f"the bias of head {name}", bias, f"[{weight.shape[0]}]")
        _check_finite({f"the weight of head {name}": weight, f"the bias of head {name}": bias})
    for name, experts in adapter.experts.items():
        a, b = experts.a_QK, experts.b_NQ
        if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
            raise _bad_shape(f"A or B of {name}", a, "[experts * rank, in] and [out, rank*experts]")
        if a.shape[0] != b.shape[1] or experts.count < 1 or a.shape[0] % experts.count:
            raise AdapterError(
                "rank_mismatch", f"A and B of {name} disagree on experts and ranks",
                seen=f"A {list(a.shape)}, B {list(b.shape)}",
                limit="A [experts * rank, in], B [out, rank * experts]",
                fix="save the adapter again",
            )  # fmt: skip
        _check_finite({f"A of {name}": a, f"B times its scale of {name}": b})


def check_heads_fit(
    heads: Mapping[str, Head], slots: Mapping[str, HeadSlot], dtype: torch.dtype
) -> None:
    """What must hold for this server to hold an adapter's head.

    Args:
        slots: name of the model's classification head → what it takes; empty: it has none.
        dtype: in which weights are stored.
    Raises:
        AdapterError: `unsupported_feature`, `shape_mismatch`, `overflow`.
    """
    for name, head in heads.items():
        if name not in slots:
            raise AdapterError(
                "unsupported_feature", "the adapter has a trained head, and this server has no"
                " classification head of that name", seen=name, limit=sorted(slots) or "none",
                fix="serve it with the model it was trained on, for classification"
                " (--runner pooling)",
            )  # fmt: skip
        slot, (labels, width) = slots[name], head.weight_NK.shape
        if width != slot.width:
            raise AdapterError(
                "shape_mismatch", f"the head {name} has another width in the adapter than in the"
                " model", seen=width, limit=slot.width,
                fix="serve it with the model it was trained on",
            )  # fmt: skip
        if labels > slot.max_labels:
            raise AdapterError(
                "shape_mismatch", f"the head {name} has more labels than a slot", seen=labels,
                limit=slot.max_labels, fix=f"start with --max-lora-cls-labels {labels}",
            )  # fmt: skip
        _check_overflow(f"the weight of head {name}", head.weight_NK, dtype)
        if head.bias_N is not None:
            _check_overflow(f"the bias of head {name}", head.bias_N, slot.bias_dtype)


def check_experts_fit(
    experts: Mapping[str, FusedExperts],
    slots: Mapping[str, ExpertsSlot],
    dtype: torch.dtype,
    max_rank: int,
) -> None:
    """What must hold for this server to hold an adapter's LoRA on fused experts.

    Args:
        slots: name of a parameter → what it takes; only those that the model has.
        dtype: in which A and B are stored.
        max_rank: the server's `--max-lora-rank`.
    Raises:
        AdapterError: `unknown_module`, `shape_mismatch`, `rank_too_large`, `overflow`.
    """
    for name, lora in experts.items():
        if name not in slots:
            raise AdapterError(
                "unknown_module", "the adapter adapts fused experts that this model does not have",
                seen=name, limit=sorted(slots)[:4] or "none",
                fix="serve it with the model it was trained on",
            )  # fmt: skip
        seen = ExpertsSlot(lora.count, lora.a_QK.shape[1], lora.b_NQ.shape[0])
        if seen != slots[name]:
            raise AdapterError(
                "shape_mismatch", f"{name} has other sizes in the adapter than in the model",
                seen=_sizes(seen), limit=_sizes(slots[name]),
                fix="serve it with the model it was trained on",
            )  # fmt: skip
        if lora.rank > max_rank:
            raise AdapterError(
                "rank_too_large", f"{name} has too large a rank", seen=lora.rank,
                limit=f"--max-lora-rank {max_rank}",
                fix=f"start the server with --max-lora-rank {slot_rank(lora.rank) or 'higher'}",
            )  # fmt: skip
        _check_overflow(f"A of {name}", lora.a_QK, dtype)
        _check_overflow(f"B times its scale of {name}", lora.b_NQ, dtype)


def refuse_parts(adapter: RoutedAdapter) -> None:
    """Raises AdapterError `unsupported_feature` where an adapter has heads or fused experts."""
    for what, names in (
        ("a trained head", adapter.heads),
        ("LoRA on fused experts", adapter.experts),
    ):
        if names:
            raise AdapterError(
                "unsupported_feature", f"the adapter has {what}, which only a server holds",
                seen=min(names), limit="low-rank layers", fix="serve it as it is",
            )  # fmt: skip


def no_experts(like: FusedExperts, slot: ExpertsSlot) -> FusedExperts:
    """LoRA that changes nothing, of another's rank."""
    q = like.rank * slot.count
    return FusedExperts(torch.zeros(q, slot.width), torch.zeros(slot.out, q), slot.count)


def _sizes(slot: ExpertsSlot) -> str:
    return f"{slot.count} experts, in {slot.width}, out {slot.out}"


def _bad_shape(what: str, tensor: torch.Tensor, limit: str) -> AdapterError:
    return AdapterError(
        "bad_shape", f"{what} has the wrong shape", seen=list(tensor.shape), limit=limit,
        fix="save the adapter again",
    )  # fmt: skip


def _check_finite(tensors: Mapping[str, torch.Tensor | None]) -> None:
    for what, tensor in tensors.items():
        if tensor is not None and not is_finite(tensor):
            raise not_finite(what, tensor)


def _check_overflow(what: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    seen, largest = float(tensor.abs().max()), torch.finfo(dtype).max
    if seen > largest:
        raise AdapterError(
            "overflow", f"{what} has values too large for {dtype}", seen=seen, limit=largest,
            fix="choose bfloat16 or float32 (--dtype)",
        )  # fmt: skip
