"""What an operator needs to know about an adapter, as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.settings import LoraExtSettings

# The values that vLLM takes for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_BYTES = 2  # bf16 and fp16
_LAYER = re.compile(r"\.\d+\.")


def summarise(adapter: RoutedAdapter) -> dict[str, Any]:
    """System, modules in groups of equal layers, memory per slot, and the server's flags."""
    max_rank = next((rank for rank in RANKS if rank >= adapter.rank), None)
    flags = ["--enable-lora"]
    if max_rank is not None:
        flags.append(f"--max-lora-rank {max_rank}")
    rows = max((_router_rows(module) for module in adapter.modules.values()), default=0)
    if max_rank is not None and rows > LoraExtSettings().router_rows(max_rank):
        flags.append(f'--additional-config \'{{"lora_ext": {{"max_router_rows": {rows}}}}}\'')
    name = "adapter" if adapter.system == "plain" else "routed"
    flags.append(f"--lora-modules {name}={adapter.source}")
    slot = slot_bytes(adapter.modules.values(), max_rank or adapter.rank, rows)
    return {
        "system": adapter.system,
        "base_model": adapter.base_model or "not said",
        "rank": adapter.rank,
        "router_rows": rows,
        "slot_mib": round(slot / 2**20, 2),
        "digest": adapter.digest,
        "modules": _groups(adapter),
        "flags": flags,
        "serve": " ".join(["vllm serve", adapter.base_model or "BASE", *flags]),
    }


def slot_bytes(modules: Iterable[RoutedModule], max_rank: int, router_rows: int) -> int:
    """Bytes one slot takes in the adapted layers at 16 bits a weight, on one device."""
    total = 0
    for module in modules:
        width, out = module.a_RK.shape[1], module.b_NR.shape[0]
        rows = 0 if module.kind == "embedding" else router_rows + 1
        total += (max_rank + rows) * width + max_rank * out
    return total * _BYTES


def _router_rows(module: RoutedModule) -> int:
    """A threshold head's row is always there and does not count."""
    return module.gate.router_rows - int(module.gate.threshold_head)


def _groups(adapter: RoutedAdapter) -> list[dict[str, Any]]:
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, module in adapter.modules.items():
        short = _LAYER.sub(".*.", name)
        key = (short, module.rank, tuple(module.a_RK.shape), module.gate)
        group = groups.setdefault(key, _describe(short, module) | {"layers": 0})
        group["layers"] += 1
    return list(groups.values())


def _describe(name: str, module: RoutedModule) -> dict[str, Any]:
    gate = module.gate.to_dict()
    gate.pop("blocks", None)
    return {
        "name": name,
        "experts": module.gate.num_gates or 1,
        "rank": module.rank,
        "in": module.a_RK.shape[1],
        "out": module.b_NR.shape[0],
        "gate": ", ".join(f"{k}={v}" for k, v in gate.items()) or "none",
    }
