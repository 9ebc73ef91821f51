"""The native format: every linear-level system in one shape (docs/native_format.md)."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, WEIGHTS, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.output import fill, new_folder
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import bad_value, base_model_of
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

PEFT_TYPE, FORMAT_VERSION = "ROUTED_LORA", 1
_KEYS = frozenset({
    "peft_type", "format_version", "base_model_name_or_path", "system", "target_modules", "routing",
    "blocks", "columns",
})  # fmt: skip
_NEEDED = _KEYS - {"base_model_name_or_path", "blocks", "columns"}
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\.weight"
    r"|(router|threshold)\.(weight|bias))"
)


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == PEFT_TYPE


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = folder.config
    _check_config(config)
    groups = group(folder.names, _PART)
    _match_targets(config["target_modules"], list(groups))
    blocks = {
        name: _read_block(folder, name, fields, groups)
        for name, fields in _block_table(config).items()
    }
    gates = _gates(config["routing"], list(groups))
    modules = {name: _read_module(folder, name, p, gates[name]) for name, p in groups.items()}
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
        AdapterError: `unsupported_feature`, a template: the native format has adapters only.
    """
    if adapter.template is not None:
        raise AdapterError(
            "unsupported_feature", f"adapters of {adapter.system} are made for a request, and the"
            " native format holds ready ones only", seen=adapter.source or adapter.system,
            limit="adapters without a user's vector or an instruction",
            fix="serve the folder as it is, or convert it, which keeps its format",
        )  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        tensors.update(_tensors(name, module, dtype))
    for name, block in adapter.blocks.items():
        tensors.update(_block_tensors(name, block, dtype))
    parts = [f"{name}.{part}" for name, block in adapter.blocks.items() for part in block.parts]
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base_model,
        "system": adapter.system,
        "target_modules": sorted([*adapter.modules, *adapter.blocks, *parts]),
        "routing": _routing(adapter.modules),
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
    tails = {tail for module in modules for tail in _tails(module)}
    for target in targets:
        if target not in tails:
            raise AdapterError(
                "missing_tensor", f"target_modules in {CONFIG} names a layer without tensors",
                seen=target, fix="save the adapter again, or remove the name",
            )  # fmt: skip
    wanted = set(targets)
    for module in modules:
        if wanted.isdisjoint(_tails(module)):
            raise AdapterError(
                "unexpected_tensor", f"there are tensors of a layer that target_modules in {CONFIG}"
                " does not name", seen=module, fix="add it to target_modules",
            )  # fmt: skip


def _tails(module: str) -> list[str]:
    """A module's name and all its tails: `a.b.c`, `b.c`, `c`."""
    words = module.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def _gates(routing: Any, modules: list[str]) -> dict[str, GateSpec]:
    """Every module's gate: the entry with the longest tail of its name, or the default."""
    if not isinstance(routing, dict):
        raise bad_value(f"routing in {CONFIG}", routing, "an object")
    for key in sorted(set(routing) - {"default", "modules"}):
        raise AdapterError(
            "unknown_key", f"routing in {CONFIG} holds an unknown key '{key}'", seen=routing[key],
            limit=["default", "modules"], fix=f"remove '{key}'",
        )  # fmt: skip
    for key in ("default", "modules"):  # a lost gate would be a plain LoRA without a word
        if key not in routing:
            raise AdapterError(
                "missing_key", f"routing in {CONFIG} has no '{key}'",
                fix=f"add \"{key}\", {{}} if there is nothing to say",
            )  # fmt: skip
    default = _gate(routing["default"], "routing.default")
    entries = routing["modules"]
    if not isinstance(entries, dict):
        raise bad_value(f"routing.modules in {CONFIG}", entries, "an object")
    specs = {tail: _gate(fields, f"routing.modules['{tail}']") for tail, fields in entries.items()}
    found, used = {}, set()
    for module in modules:
        tail = next((t for t in _tails(module) if t in specs), None)
        found[module] = default if tail is None else specs[tail]
        used.add(tail)
    for tail in specs:
        if tail not in used:
            raise AdapterError(
                "bad_gate", f"routing.modules in {CONFIG} has a gate that no layer uses",
                seen=tail, fix="remove it, or mend the layer's name",
            )  # fmt: skip
    return found


def _gate(fields: Any, where: str) -> GateSpec:
    if not isinstance(fields, dict):
        raise bad_value(f"{where} in {CONFIG}", fields, "an object with the fields of a gate")
    return make_gate(fields, where)


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
    gate = _gate(fields["gate"], f"blocks['{name}'].gate")
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
        kind="embedding" if embedding else "linear",
    )  # fmt: skip


def _key(parts: dict[str, str], name: str, module: str) -> str:
    part(parts, name, module)
    return name


def _tensors(name: str, module: RoutedModule, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    stem = "lora_embedding_" if module.kind == "embedding" else "lora_"
    matrices = {f"{stem}A.weight": module.a_RK, f"{stem}B.weight": module.b_NR}
    found = {key: value.to(dtype or value.dtype) for key, value in matrices.items()}
    if module.router_GK is not None:
        found["router.weight"] = module.router_GK
    if module.bias_G is not None:
        found["router.bias"] = module.bias_G
    if module.head_K is not None:
        found["threshold.weight"] = module.head_K[None]
        found["threshold.bias"] = torch.tensor([module.head_bias], dtype=torch.float32)
    return {f"{name}.{key}": _own(value) for key, value in found.items()}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A clone, because safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _routing(modules: dict[str, RoutedModule]) -> dict[str, Any]:
    """The commonest gate as the default, the others by the layers' full names."""
    # Sorted, so that equal adapters give equal files, and equal digests.
    specs = {name: modules[name].gate for name in sorted(modules)}
    default = Counter(specs.values()).most_common(1)[0][0] if specs else GateSpec()
    others = {name: spec.to_dict() for name, spec in specs.items() if spec != default}
    return {"default": default.to_dict(), "modules": others}


READER = Reader(
    name="native",
    title="native routed LoRA",
    url="docs/native_format.md",
    files="adapter_config.json (peft_type ROUTED_LORA, format_version, system, target_modules, "
    "routing), adapter_model.safetensors with <module>.lora_A.weight, .lora_B.weight, "
    ".router.weight, ...",
    peft_types=(PEFT_TYPE,),
    detect=detect,
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
