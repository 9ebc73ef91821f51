"""The native format: every linear-level system in one shape (docs/native_format.md)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, WEIGHTS, AdapterFolder
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.output import fill, new_folder
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.native_routing import (
    Routing,
    read_gate,
    routing_of,
    shared_routers,
    tails,
)
from vllm_lora_ext.adapters.readers.peft_config import bad_value, base_model_of
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec, InputNorm

PEFT_TYPE, FORMAT_VERSION = "ROUTED_LORA", 1
_KEYS = frozenset({
    "peft_type", "format_version", "base_model_name_or_path", "system", "target_modules", "routing",
    "blocks", "columns",
})  # fmt: skip
_NEEDED = _KEYS - {"base_model_name_or_path", "blocks", "columns"}
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\.weight"
    r"|lora_magnitude"
    r"|(router|threshold)\.(weight|bias)|router\.(logit_bias|row_sums|tail|tail_sums))"
)


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = folder.config
    _check_config(config)
    groups = group(folder.names, _PART)
    _match_targets(config["target_modules"], list(groups))
    blocks = {
        name: _read_block(folder, name, fields, groups)
        for name, fields in _block_table(config).items()
    }
    routing = Routing(config["routing"], list(groups))
    modules = {n: _read_module(folder, n, p, routing.gates[n]) for n, p in groups.items()}
    modules = routing.with_routers(modules)
    base_model = base_model_of(config, CONFIG)
    return RoutedAdapter(
        modules, system=config["system"], base_model=base_model, blocks=blocks,
        columns=_columns(config.get("columns", [])),
    )  # fmt: skip


def write_native(
    adapter: RoutedAdapter, folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Path:
    """Write `adapter` in the native format; reading it again gives the same tensors, bit for bit.

    Args:
        folder: appears whole or not at all; an earlier adapter there is replaced.
        dtype: float32, float16 or bfloat16 for A and B; None keeps theirs. Routers, biases and
            threshold heads stay as they are: rounding them would change which experts are chosen.
    Returns:
        The folder.
    Raises:
        AdapterError: `output_exists` (it holds other things than an adapter), `output_failed`.
    """
    with new_folder(Path(folder), _is_adapter) as part:
        fill_native(part, adapter, dtype)
    return Path(folder)


def fill_native(folder: Path, adapter: RoutedAdapter, dtype: torch.dtype | None = None) -> None:
    """The files of `write_native` into a folder of `adapters.output`.

    Raises:
        AdapterError: `unsupported_feature`, a template or a classifier: the native format has
            ready adapters with gates of single layers only.
    """
    if adapter.classifier is not None:
        raise AdapterError(
            "unsupported_feature", f"adapters of {adapter.system} have a classifier, and the native"
            " format holds gates of single layers only", seen=adapter.source or adapter.system,
            limit="adapters without a classifier", fix="serve the folder as it is",
        )  # fmt: skip
    if adapter.template is not None:
        raise AdapterError(
            "unsupported_feature", f"adapters of {adapter.system} are made for a request, and the"
            " native format holds ready ones only", seen=adapter.source or adapter.system,
            limit="adapters without a user's vector or an instruction",
            fix="serve the folder as it is, or convert it, which keeps its format",
        )  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    routers = shared_routers(adapter.modules)
    for name, module in adapter.modules.items():
        tensors.update(_tensors(name, module, dtype, routers.get(name, name) == name))
    for name, block in adapter.blocks.items():
        tensors.update(_block_tensors(name, block, dtype))
    parts = [f"{name}.{part}" for name, block in adapter.blocks.items() for part in block.parts]
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "system": adapter.system,
        "target_modules": sorted([*adapter.modules, *adapter.blocks, *parts]),
        "routing": routing_of(adapter.modules),
    }
    if adapter.blocks:
        config["blocks"] = {
            name: {"gate": block.gate.to_dict(), "act": block.act}
            for name, block in sorted(adapter.blocks.items())
        }
    if adapter.columns:
        config["columns"] = [column.to_dict() for column in adapter.columns]
    fill(folder, tensors, {CONFIG: json.dumps(config, indent=2) + "\n"})


def _is_adapter(place: Path) -> bool:
    return {path.name for path in place.iterdir()} <= {CONFIG, WEIGHTS[0]}


def _check_config(config: dict[str, Any]) -> None:
    for key in sorted(set(config) - _KEYS):
        raise AdapterError(
            "unknown_key", f"{CONFIG} holds an unknown key '{key}'", seen=config[key],
            limit=sorted(_KEYS), fix=f"remove '{key}'",
        )  # fmt: skip
    for key in sorted(_NEEDED - set(config)):
        raise AdapterError("missing_key", f"{CONFIG} has no '{key}'", fix=f"add '{key}'")
    version = config["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise AdapterError(
            "unknown_version", f"format_version in {CONFIG} is not known here", seen=version,
            limit=FORMAT_VERSION, fix="update vllm-lora-ext, or write the adapter again",
        )  # fmt: skip
    if not isinstance(config["system"], str) or not config["system"]:
        raise bad_value(f"system in {CONFIG}", config["system"], "a name")
    targets = config["target_modules"]
    if not isinstance(targets, list) or not all(isinstance(t, str) and t for t in targets):
        raise bad_value(f"target_modules in {CONFIG}", targets, "a list of module names")


def _match_targets(targets: list[str], modules: list[str]) -> None:
    """`target_modules` and the tensors must name the same layers: a lost layer is an error."""
    every = {tail for module in modules for tail in tails(module)}
    for target in targets:
        if target not in every:
            raise AdapterError(
                "missing_tensor", f"target_modules in {CONFIG} names a layer without tensors",
                seen=target, fix="save the adapter again, or remove the name",
            )  # fmt: skip
    wanted = set(targets)
    for module in modules:
        if wanted.isdisjoint(tails(module)):
            raise AdapterError(
                "unexpected_tensor", f"there are tensors of a layer that target_modules in {CONFIG}"
                " does not name", seen=module, fix="add it to target_modules",
            )  # fmt: skip


def _columns(entries: Any) -> tuple[Column, ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise bad_value(f"columns in {CONFIG}", entries, "a list of objects")
    return tuple(Column.from_dict(entry) for entry in entries)


def _block_table(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    table = config.get("blocks", {})
    if not isinstance(table, dict):
        raise bad_value(f"blocks in {CONFIG}", table, "an object")
    for name, fields in table.items():
        where = f"blocks['{name}'] in {CONFIG}"
        if not isinstance(fields, dict):
            raise bad_value(where, fields, "an object with 'gate' and 'act'")
        for key in sorted(set(fields) - {"gate", "act"}):
            raise AdapterError(
                "unknown_key", f"{where} holds an unknown key '{key}'", seen=fields[key],
                limit=["act", "gate"], fix=f"remove '{key}'",
            )  # fmt: skip
        for key in sorted({"gate", "act"} - set(fields)):
            raise AdapterError("missing_key", f"{where} has no '{key}'", fix=f"add '{key}'")
        if fields["act"] is not None and not isinstance(fields["act"], str):
            raise bad_value(f"act of {where}", fields["act"], "a name or null")
    return table


def _read_block(
    folder: AdapterFolder, name: str, fields: dict[str, Any], groups: dict[str, dict[str, str]]
) -> MixBlock:
    """Takes the block and the layers inside it out of `groups`."""
    own = groups.pop(name, {})
    router_GK = folder.take(part(own, "router.weight", name))
    if len(own) > 1:
        raise AdapterError(
            "unexpected_tensor", f"the MLP block {name} has more than a router",
            seen=sorted(own), limit="router.weight", fix="remove the others",
        )  # fmt: skip
    parts = {}
    for layer in [layer for layer in groups if layer.rpartition(".")[0] == name]:
        tensors = groups.pop(layer)
        a_RK = folder.take(part(tensors, "lora_A.weight", layer))
        b_NR = folder.take(part(tensors, "lora_B.weight", layer))
        if len(tensors) > 2:
            raise AdapterError(
                "unexpected_tensor", f"{layer} belongs to an MLP block and has more than A and B",
                seen=sorted(tensors), limit="lora_A.weight, lora_B.weight",
                fix="remove the others",
            )  # fmt: skip
        parts[layer.rpartition(".")[2]] = LowRank(a_RK, b_NR)
    gate = read_gate(fields["gate"], f"blocks['{name}'].gate")
    return MixBlock(gate, router_GK, parts, fields["act"])


def _block_tensors(
    name: str, block: MixBlock, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    found = {f"{name}.router.weight": block.router_GK}
    for layer, m in block.parts.items():
        found[f"{name}.{layer}.lora_A.weight"] = m.a_RK.to(dtype or m.a_RK.dtype)
        found[f"{name}.{layer}.lora_B.weight"] = m.b_NR.to(dtype or m.b_NR.dtype)
    return {key: _own(value) for key, value in found.items()}


def _read_module(
    folder: AdapterFolder, module: str, parts: dict[str, str], gate: GateSpec
) -> RoutedModule:
    embedding = any(name.startswith("lora_embedding_") for name in parts)
    stem = "lora_embedding_" if embedding else "lora_"
    take = {name: folder.take(tensor) for name, tensor in parts.items()}
    a_RK = take.pop(_key(parts, f"{stem}A.weight", module))
    b_NR = take.pop(_key(parts, f"{stem}B.weight", module))
    head_1K = take.pop("threshold.weight", None)
    head_bias = take.pop("threshold.bias", None)
    router, bias = take.pop("router.weight", None), take.pop("router.bias", None)
    logit_bias, norm = take.pop("router.logit_bias", None), _norm(module, gate, router, take)
    magnitude_N = take.pop("lora_magnitude", None)
    if take:  # both kinds of A and B
        raise AdapterError(
            "unexpected_tensor", f"{module} is adapted both as a linear and as an embedding",
            seen=sorted(take), fix="keep one of them",
        )  # fmt: skip
    if (head_1K is None) != (head_bias is None):
        have = "threshold.weight" if head_bias is None else "threshold.bias"
        raise AdapterError(
            "missing_tensor", f"{module}.{have} stands alone: a threshold head needs weight and"
            " bias", fix="save the adapter again",
        )  # fmt: skip
    width = a_RK.shape[-1] if a_RK.ndim else 0
    for name, tensor, shape in (
        ("weight", head_1K, (1, width)), ("bias", head_bias, (1,)),
    ):  # fmt: skip
        if tensor is not None and tuple(tensor.shape) != shape:
            raise AdapterError(
                "bad_shape", f"{module}.threshold.{name} has the wrong shape",
                seen=list(tensor.shape), limit=list(shape), fix="save the adapter again",
            )  # fmt: skip
    return RoutedModule(
        a_RK=a_RK, b_NR=b_NR, gate=gate, router_GK=router, bias_G=bias,
        head_K=None if head_1K is None else head_1K[0],
        head_bias=0.0 if head_bias is None else float(head_bias),
        kind="embedding" if embedding else "linear", logit_bias_G=logit_bias, norm=norm,
        magnitude_N=magnitude_N,
    )  # fmt: skip


def _norm(
    module: str, gate: GateSpec, router_GK: torch.Tensor | None, take: dict[str, torch.Tensor]
) -> InputNorm | None:
    """What a normalised router needs; takes the tensors of a constant part of its input."""
    tail = {key: take.pop(f"router.{key}", None) for key in ("row_sums", "tail", "tail_sums")}
    here = [key for key, tensor in tail.items() if tensor is not None]
    if gate.normalise == "none" or router_GK is None or router_GK.ndim != 2:
        if here:
            raise AdapterError(
                "unexpected_tensor", f"{module}.router.{here[0]} belongs to a router of the layer's"
                " own that reads a normalised input", fix="mend the gate, or remove the tensor",
            )  # fmt: skip
        return None
    if not here:
        return InputNorm.of(router_GK)
    sums_G, tail_G, moments = tail.values()
    if sums_G is None or tail_G is None or moments is None or tuple(moments.shape) != (3,):
        raise AdapterError(
            "missing_tensor", f"the constant part of the input of {module}.router is not whole",
            seen=here, limit="router.row_sums [G], router.tail [G], router.tail_sums [3]",
            fix="save the adapter again",
        )  # fmt: skip
    count, total, squares = moments.tolist()
    if not 1 <= count < 1 << 24 or count % 1:
        raise bad_value(f"the first number of {module}.router.tail_sums", count, "a whole number")
    return InputNorm(router_GK.shape[1] + int(count), sums_G, tail_G, total, squares)


def _key(parts: dict[str, str], name: str, module: str) -> str:
    part(parts, name, module)
    return name


def _tensors(
    name: str, module: RoutedModule, dtype: torch.dtype | None, own_router: bool
) -> dict[str, torch.Tensor]:
    stem = "lora_embedding_" if module.kind == "embedding" else "lora_"
    matrices = {f"{stem}A.weight": module.a_RK, f"{stem}B.weight": module.b_NR}
    found = {key: value.to(dtype or value.dtype) for key, value in matrices.items()}
    if own_router:
        found |= _router_tensors(module)
    if module.magnitude_N is not None:
        found["lora_magnitude"] = module.magnitude_N
    if module.head_K is not None:
        found["threshold.weight"] = module.head_K[None]
        found["threshold.bias"] = torch.tensor([module.head_bias], dtype=torch.float32)
    return {f"{name}.{key}": _own(value) for key, value in found.items()}


def _router_tensors(module: RoutedModule) -> dict[str, torch.Tensor]:
    found = {
        "router.weight": module.router_GK, "router.bias": module.bias_G,
        "router.logit_bias": module.logit_bias_G,
    }  # fmt: skip
    norm = module.norm
    if norm is not None and norm.tail_G is not None:
        assert module.router_GK is not None
        count = norm.width - module.router_GK.shape[1]
        moments = torch.tensor([count, norm.tail_sum, norm.tail_squares], dtype=torch.float32)
        found |= {
            "router.row_sums": norm.row_sums_G, "router.tail": norm.tail_G,
            "router.tail_sums": moments,
        }  # fmt: skip
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A clone, because safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


READER = Reader(
    name="native",
    title="native routed LoRA",
    url="docs/native_format.md",
    files="adapter_config.json (peft_type ROUTED_LORA, format_version, system, target_modules, "
    "routing), adapter_model.safetensors with <module>.lora_A.weight, .lora_B.weight, "
    ".router.weight, ...",
    peft_types=(PEFT_TYPE,),
    detect=of_type(PEFT_TYPE),
    read=read,
    summary="This package's own format: any gate of the table, spelled by name in the config. "
    "convert writes it, for every system.",
    formula="y = W x + B (g * (A x));  "
    "g = expand(constant * mask(weight(select(score(u)))), block)",
    traps=(
        "lora_B holds the experts' B times alpha / r: nothing is scaled later.",
        "Unknown keys and gate fields without effect are errors.",
    ),
)
