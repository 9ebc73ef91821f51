"""What an operator needs to know about an adapter, or about a system, as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vllm_lora_ext.adapters.limits import slot_rank
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.settings import LoraExtSettings

_BYTES = 2  # bf16 and fp16
_LAYER = re.compile(r"\.\d+\.")


def summarise(adapter: RoutedAdapter, reader: Reader | None = None) -> dict[str, Any]:
    """System, layers in groups of equals, memory, and the server's flags.

    Args:
        reader: the one that read the files; says more about the system when it is given.
    Returns:
        JSON-ready. `slot_mib` is what a slot reserves in the adapted layers, `adapter_mib` what
        this adapter's tensors fill of it, both at 16 bits a weight and on one device.
    """
    max_rank = slot_rank(adapter.rank)
    flags = ["--enable-lora"]
    if max_rank is not None:
        flags.append(f"--max-lora-rank {max_rank}")
    every: list[RoutedModule | MixBlock] = [*adapter.modules.values(), *adapter.blocks.values()]
    rows = adapter.router_rows
    reserved = LoraExtSettings().router_rows(max_rank or max(adapter.rank, 1))
    if max_rank is not None and rows > reserved:
        flags.append(f'--additional-config \'{{"lora_ext": {{"max_router_rows": {rows}}}}}\'')
    name = "adapter" if adapter.system == "plain" else "routed"
    flags.append(f"--lora-modules {name}={adapter.source}")
    slot = slot_bytes(every, max_rank or adapter.rank, max(rows, reserved))
    return {
        "system": adapter.system,
        "title": reader.title if reader else adapter.system,
        "format": reader.name if reader else "",
        "paper": reader.paper if reader else "",
        "base_model": adapter.base_model or "not said",
        "rank": adapter.rank,
        "router_rows": rows,
        "slot_mib": round(slot / 2**20, 2),
        "adapter_mib": round(adapter_bytes(every) / 2**20, 2),
        "digest": adapter.digest,
        "modules": _groups(adapter),
        "blocks": _block_groups(adapter),
        "settings": dict(reader.settings) if reader else {},
        "flags": flags,
        "serve": " ".join(["vllm serve", adapter.base_model or "BASE", *flags]),
    }


def system_row(reader: Reader) -> dict[str, Any]:
    """A system as its reader describes it, JSON-ready; `status` is `served` or `refused`."""
    return {
        "name": reader.name,
        "title": reader.title,
        "status": "refused" if reader.refused else "served",
        "reason": reader.refused,
        "summary": reader.summary,
        "paper": reader.paper,
        "url": reader.url,
        "files": reader.files,
        "formula": reader.formula,
        "settings": dict(reader.settings),
        "traps": list(reader.traps),
    }


def slot_bytes(layers: Iterable[RoutedModule | MixBlock], max_rank: int, router_rows: int) -> int:
    """Bytes that one slot reserves in the adapted layers, whatever the adapter fills of them."""
    total = 0
    for layer in layers:
        rows = (
            0 if isinstance(layer, RoutedModule) and layer.kind == "embedding" else router_rows + 1
        )
        for part in _parts(layer):
            total += (max_rank + rows) * part.a_RK.shape[1] + max_rank * part.b_NR.shape[0]
    return total * _BYTES


def adapter_bytes(layers: Iterable[RoutedModule | MixBlock]) -> int:
    """Bytes of the tensors themselves; an A that experts share counts once."""
    total = 0
    for layer in layers:
        own = [tensor for part in _parts(layer) for tensor in (part.a_RK, part.b_NR)]
        own += [layer.router_GK] if layer.router_GK is not None else []
        if isinstance(layer, RoutedModule):
            own += [t for t in (layer.bias_G, layer.head_K) if t is not None]
        total += sum(tensor.numel() for tensor in own)
    return total * _BYTES


def gate_text(gate: GateSpec) -> str:
    """The fields that say how experts are chosen, `none` for a plain LoRA."""
    fields = gate.to_dict()
    fields.pop("blocks", None)
    return ", ".join(f"{k}={v}" for k, v in fields.items()) or "none"


def _parts(layer: RoutedModule | MixBlock) -> list[RoutedModule | LowRank]:
    return list(layer.parts.values()) if isinstance(layer, MixBlock) else [layer]


def _groups(adapter: RoutedAdapter) -> list[dict[str, Any]]:
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, module in adapter.modules.items():
        short = _LAYER.sub(".*.", name)
        a, b = module.a_RK, module.b_NR
        fields = _gate_fields(module.gate, module.rank) | {
            "in": a.shape[1], "out": b.shape[0], "shared_a": a.shape[0] != b.shape[1],
        }  # fmt: skip
        key = (short, tuple(a.shape), tuple(b.shape), module.gate)
        groups.setdefault(key, {"name": short, "layers": 0, **fields})["layers"] += 1
    return list(groups.values())


def _block_groups(adapter: RoutedAdapter) -> list[dict[str, Any]]:
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, block in adapter.blocks.items():
        short = _LAYER.sub(".*.", f"{name}.").rstrip(".")
        fields = _gate_fields(block.gate, block.rank) | {
            "in": block.router_GK.shape[1], "parts": sorted(block.parts),
            "activation": block.act or "the model's",
        }  # fmt: skip
        key = (short, block.gate, block.act, tuple(block.parts))
        groups.setdefault(key, {"name": short, "layers": 0, **fields})["layers"] += 1
    return list(groups.values())


def _gate_fields(gate: GateSpec, rank: int) -> dict[str, Any]:
    return {
        "experts": gate.num_gates or 1,
        "ranks": sorted(set(gate.blocks)) or [rank],
        "rank": rank,
        "gate": gate_text(gate),
    }
