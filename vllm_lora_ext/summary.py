"""What an operator needs to know about an adapter, or about a system, as plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.adapters.limits import slot_rank
from vllm_lora_ext.adapters.model import LowRank, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.native_routing import shared_routers
from vllm_lora_ext.adapters.template import Template
from vllm_lora_ext.kernels.gated_lora.memory import ROUTER_BYTES
from vllm_lora_ext.kernels.gated_lora.memory import slot_bytes as site_bytes
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.settings import KEY, LoraExtSettings

_STORED = torch.bfloat16  # or float16: A and B in a slot of a GPU
_FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_LAYER = re.compile(r"\.\d+\.")
_HEADS = 32  # a CPU takes multiples of it


def summarise(adapter: RoutedAdapter, reader: Reader | None = None) -> dict[str, Any]:
    """System, layers in groups of equals, memory, and the server's flags.

    Args:
        reader: the one that read the files; says more about the system when it is given.
    Returns:
        JSON-ready. `slot_mib` is what a slot reserves in the adapted layers of one GPU, fused ones
        whole (`slot_bytes`), with A and B at 16 bits and routers at 32, `adapter_mib` what this
        adapter's tensors fill of it;
        `slot_mib_cpu` is the slot on a CPU, where all is at 32 bits.
    """
    max_rank = slot_rank(adapter.rank)
    flags = ["--enable-lora"]
    if max_rank is not None:
        flags.append(f"--max-lora-rank {max_rank}")
    rows = adapter.router_rows
    reserved = LoraExtSettings().router_rows(max_rank or max(adapter.rank, 1))
    settings: dict[str, Any] = {}
    if max_rank is not None and rows > reserved:
        settings["max_router_rows"] = rows
    if adapter.attends:
        settings["rank_attention"] = attention_setting(adapter)
    if settings:
        flags.append(f"--additional-config '{json.dumps({KEY: settings})}'")
    if adapter.heads:
        labels = max(len(head.weight_NK) for head in adapter.heads.values())
        flags.append(f"--runner pooling --max-lora-cls-labels {labels}")
    name = "adapter" if adapter.system == "plain" else "routed"
    flags.append(f"--lora-modules {name}={adapter.source}")
    gpu, cpu = (slot_bytes(adapter, max_rank or adapter.rank, on_cpu) for on_cpu in (False, True))
    return {
        "system": adapter.system,
        "title": reader.title if reader else adapter.system,
        "format": reader.name if reader else "",
        "paper": reader.paper if reader else "",
        "base_model": adapter.base_model or "not said",
        "rank": adapter.rank,
        "router_rows": rows,
        "classifier": _classifier_text(adapter.classifier),
        "slot_mib": round(gpu / 2**20, 2),
        "slot_mib_cpu": round(cpu / 2**20, 2),
        "adapter_mib": round(adapter_bytes(adapter) / 2**20, 2),
        "digest": adapter.digest,
        "modules": _groups(adapter),
        "blocks": _block_groups(adapter),
        "parts": _part_groups(adapter),
        "fields": request_fields(adapter),
        "settings": dict(reader.settings) if reader else {},
        "flags": flags,
        "serve": " ".join(["vllm serve", adapter.base_model or "BASE", *flags]),
    }


def _classifier_text(classifier: Classifier | None) -> str:
    """How gates come from a first pass; empty where they do not."""
    if classifier is None:
        return ""
    sizes = [classifier.hidden_size, *(len(weight) for weight in classifier.weights)]
    steps = [" → ".join(map(str, sizes)), "ReLU" if classifier.relu and sizes[2:] else ""]
    steps.append(f"softmax / {classifier.temperature:g}" if classifier.softmax else "")
    steps.append("" if classifier.top_k is None else f"top {classifier.top_k}")
    steps.append("softmax again" if classifier.softmax_again else "")
    passes = "two passes"
    if classifier.frozen:
        passes += " for the prompt; behind it frozen, an approximation"
    return ", ".join(filter(None, steps)) + f"; {passes}"


def attention_setting(adapter: RoutedAdapter) -> dict[str, int]:
    """The setting `rank_attention` that is large enough for an adapter, with a size of heads that
    attention backends take."""
    heads = [adapter.modules[name].gate.blocks for name in adapter.attends]
    return {
        "heads": max(map(len, heads)),
        "head_size": -(-max(sizes[0] for sizes in heads) // _HEADS) * _HEADS,
    }


def request_fields(adapter: RoutedAdapter) -> dict[str, str]:
    """Which keys of a request's `lora_ext` mean something to an adapter → what they must hold."""
    fields = {"adapters": "its name; scale, spans, modality"}
    if adapter.dora:
        fields["adapters"] = "its name; no scale, spans or modality"
    if adapter.classifier is not None or adapter.attends or adapter.heads or adapter.experts:
        fields["adapters"] = "its name, alone"
    template = adapter.template
    if template is not None and template.user is not None:
        fields["user"] = f"{template.user} numbers, needed"
    if template is not None and template.instruction:
        fields["instruction"] = "a text, or ids; the last user message without it"
    experts = [column.expert for column in adapter.columns if column.expert]
    if experts:
        fields["gates"] = "weights of " + ", ".join(experts)
    modalities = {m for column in adapter.columns for m in column.modalities} - {"text"}
    if modalities:
        fields["modality_spans"] = "where no multimodal input says it: " + ", ".join(
            sorted(modalities)
        )
    return fields


def system_row(reader: Reader) -> dict[str, Any]:
    """A system as its reader describes it, JSON-ready; `status` as `Reader.status`."""
    return {
        "name": reader.name,
        "title": reader.title,
        "status": reader.status,
        "needs": list(reader.needs),
        "reason": reader.refused,
        "summary": reader.summary,
        "paper": reader.paper,
        "url": reader.url,
        "files": reader.files,
        "formula": reader.formula,
        "settings": dict(reader.settings),
        "traps": list(reader.traps),
    }


def slot_bytes(adapter: RoutedAdapter, max_rank: int, on_cpu: bool) -> int:
    """Bytes that one slot reserves in the adapted layers for adapters of up to `max_rank`, with
    routers like this one's.

    Layers that vLLM fuses count whole: the slot of q and v has room for k. What the adapter does
    not tell is taken to be like its neighbours (`_out`).
    """
    total = 0
    linears: dict[str, _Linear] = {}
    for name, layer in _low_ranks(adapter):
        width, out = layer.a_RK.shape[1], layer.b_NR.shape[0]
        if _is_stock(name, layer):
            total += _STORED.itemsize * max_rank * (width + out)
        else:
            linears[name] = _Linear(width, out, _router_rows(layer))
    if adapter.template is not None:
        rows = adapter.template.router_rows
        made = adapter.template.sizes.items()
        linears |= {name: _Linear(width, out, rows) for name, (width, out) in made}
    for width, sizes, rows in _fused(linears):
        total += site_bytes(width, sizes, max_rank, rows, _STORED, on_cpu)
    for experts in adapter.experts.values():
        both = experts.a_QK.shape[1] + experts.b_NQ.shape[0]
        total += _STORED.itemsize * experts.count * max_rank * both
    total += sum(_STORED.itemsize * head.weight_NK.numel() for head in adapter.heads.values())
    return total + sum(ROUTER_BYTES * b.router_GK.numel() for b in adapter.blocks.values())


class _Linear(NamedTuple):
    """In and out features, and routers and heads."""

    width: int
    out: int
    router_rows: int


def _fused(linears: Mapping[str, _Linear]) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """In features, sizes of all slices and routers of each layer as vLLM has it."""
    left = dict(linears)
    for name in linears:
        before, _, last = name.rpartition(".")
        if name not in left:
            continue
        parts = next((parts for parts in _FUSED if last in parts), (last,))
        names = [f"{before}.{part}" if before else part for part in parts]
        here = [left.pop(n) for n in names if n in left]
        sizes = tuple(_out(linears, n, names) for n in names)
        yield here[0].width, sizes, sum(linear.router_rows for linear in here)


def _out(linears: Mapping[str, _Linear], name: str, names: Sequence[str]) -> int:
    """Out features of a slice. One that is not adapted is as large as what the adapter has of the
    layer: k as v, up as gate, q as what goes into the output projection."""
    if name in linears:
        return linears[name].out
    others = [linears[n].out for n in names if n in linears]
    before, _, last = name.rpartition(".")
    if last == "q_proj":
        output = linears.get(f"{before}.o_proj")
        return output.width if output else max(others)
    return min(others)


def _router_rows(layer: RoutedModule | LowRank) -> int:
    """Routers and heads of a linear's own; a block's are counted with the block."""
    return 0 if isinstance(layer, LowRank) else layer.gate.router_rows + layer.gate.head_rows


def adapter_bytes(adapter: RoutedAdapter) -> int:
    """Bytes of the tensors themselves; an A that experts share counts once. What adapters are made
    of for a request stays in host memory, as it was read."""
    if adapter.template is not None:
        return adapter.template.nbytes
    classifier = 0 if adapter.classifier is None else adapter.classifier.nbytes
    layers = [layer for _, layer in _low_ranks(adapter)]
    weights = [tensor for layer in layers for tensor in (layer.a_RK, layer.b_NR)]
    weights += [tensor for e in adapter.experts.values() for tensor in (e.a_QK, e.b_NQ)]
    weights += [head.weight_NK for head in adapter.heads.values()]
    gates: list[torch.Tensor | None] = [block.router_GK for block in adapter.blocks.values()]
    owners = shared_routers(adapter.modules)
    for name, module in adapter.modules.items():
        gates += [module.head_K, module.attention_PR, *2 * [module.magnitude_N]]
        if name not in owners:
            gates += [module.router_GK, module.bias_G, module.logit_bias_G]
    rest = sum(t.numel() * ROUTER_BYTES for t in gates if t is not None)
    return sum(t.numel() * _STORED.itemsize for t in weights) + rest + classifier


def gate_text(gate: GateSpec) -> str:
    """The fields that say how experts are chosen, `none` for a plain LoRA."""
    fields = gate.to_dict()
    fields.pop("blocks", None)
    return ", ".join(f"{k}={v}" for k, v in fields.items()) or "none"


def _low_ranks(adapter: RoutedAdapter) -> Iterator[tuple[str, RoutedModule | LowRank]]:
    """Every linear that is adapted, those of MLP blocks too."""
    yield from adapter.modules.items()
    for name, block in adapter.blocks.items():
        yield from ((f"{name}.{part}", layer) for part, layer in block.parts.items())


def _is_stock(name: str, layer: RoutedModule | LowRank) -> bool:
    """Embeddings and the output matrix keep vLLM's own buffers, which have no routers."""
    embedding = isinstance(layer, RoutedModule) and layer.kind == "embedding"
    return embedding or name.endswith("lm_head")


def _groups(adapter: RoutedAdapter) -> list[dict[str, Any]]:
    if adapter.template is not None:
        return _made_groups(adapter.template)
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    owners = shared_routers(adapter.modules)
    for name, module in adapter.modules.items():
        short = _LAYER.sub(".*.", name)
        router_of = _LAYER.sub(".*.", owners.get(name, ""))
        a, b = module.a_RK, module.b_NR
        fields = _gate_fields(module.gate, module.rank) | {
            "in": a.shape[1], "out": b.shape[0], "shared_a": a.shape[0] != b.shape[1],
            "router_of": router_of, "dora": module.magnitude_N is not None,
        }  # fmt: skip
        key = (short, tuple(a.shape), tuple(b.shape), module.gate, router_of, fields["dora"])
        groups.setdefault(key, {"name": short, "layers": 0, **fields})["layers"] += 1
    return list(groups.values())


def _made_groups(template: Template) -> list[dict[str, Any]]:
    """Layers of adapters that are made for a request."""
    rank, kind = template.rank, "an instruction" if template.instruction else "a user"
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, (width, out) in template.sizes.items():
        short = _LAYER.sub(".*.", name)
        fields = {
            "name": short, "layers": 0, "experts": template.router_rows or 1, "ranks": [rank],
            "rank": rank, "gate": "made for " + kind,
            "in": width, "out": out, "shared_a": False, "router_of": "",
        }  # fmt: skip
        groups.setdefault((short, width, out), fields)["layers"] += 1
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


def _part_groups(adapter: RoutedAdapter) -> list[dict[str, Any]]:
    """Trained heads, and LoRA on all experts of a layer."""
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, head in adapter.heads.items():
        out, width = head.weight_NK.shape
        groups[name, out] = {"name": name, "layers": 1, "what": "trained head", "rank": "",
                             "in": width, "out": out}  # fmt: skip
    for name, experts in adapter.experts.items():
        short, sizes = _LAYER.sub(".*.", name), (experts.a_QK.shape[1], experts.b_NQ.shape[0])
        fields = {"what": f"{experts.count} experts of the model", "rank": experts.rank,
                  "in": sizes[0], "out": sizes[1]}  # fmt: skip
        key = (short, experts.count, experts.rank, sizes)
        groups.setdefault(key, {"name": short, "layers": 0, **fields})["layers"] += 1
    return list(groups.values())


def _gate_fields(gate: GateSpec, rank: int) -> dict[str, Any]:
    return {
        "experts": gate.num_gates or 1,
        "ranks": sorted(set(gate.blocks)) or [rank],
        "rank": rank,
        "gate": gate_text(gate),
    }
