"""What PEFT saves beside low-rank layers: `modules_to_save` of classifiers, `target_parameters`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_lora_ext.adapters.folder import AdapterFolder, missing_tensor
from vllm_lora_ext.adapters.model import FusedExperts, Head
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, bad_value
from vllm_lora_ext.errors import AdapterError

KEYS = ("modules_to_save", "target_parameters")
HEADS = ("classifier", "score")
# Parameters of a module of experts, in the order in which PEFT wraps them: the first innermost.
EXPERTS = ("gate_up_proj", "down_proj")
_HEAD = re.compile(r"(?P<module>(.+\.)?(classifier|score))\.(?P<part>weight|bias)")
_FUSED = re.compile(r"(?P<module>.+\.experts(\.base_layer)?)\.(?P<part>lora_[AB])(\.\w+)?\.weight")


def read_heads(folder: AdapterFolder, where: str) -> dict[str, Head]:
    """The classification head that was trained as a whole, if the config says that there is one.

    PEFT names both spellings of a head in the config of every classifier; the model has one.

    Raises:
        AdapterError: `unsupported_feature`, `bad_value`, `missing_tensor`, `duplicate_tensor`.
    """
    saved = names_of(folder, "modules_to_save", where)
    for name in saved:
        if name not in HEADS:
            raise AdapterError(
                "unsupported_feature", f"'modules_to_save' in {where}: fully trained modules cannot"
                " be served", seen=name, limit=list(HEADS),
                fix="train without it, or merge it into the base model",
            )  # fmt: skip
    found = {
        name.rpartition(".")[2]: parts
        for name, parts in group(folder.names, _HEAD).items()
        if name.rpartition(".")[2] in saved
    }
    if len(found) > 1:
        raise AdapterError(
            "duplicate_tensor", "the adapter has two classification heads", seen=sorted(found),
            limit="one", fix="save one adapter per folder",
        )  # fmt: skip
    if saved and not found:
        raise missing_tensor(f"{saved[-1]}.weight", f" ('modules_to_save' in {where} names it)")
    heads = {}
    for name, parts in found.items():
        bias = folder.take(parts["bias"]) if "bias" in parts else None
        heads[name] = Head(folder.take(part(parts, "weight", name)), bias)
    return heads


def read_experts(folder: AdapterFolder, config: PeftLora) -> dict[str, FusedExperts]:
    """LoRA on parameters that hold all experts of a layer.

    PEFT wraps one parameter of a module after the other, so that their tensors are called
    `experts.base_layer.lora_A` and `experts.lora_A`.

    Raises:
        AdapterError: `unsupported_feature`, `missing_key`, `rank_mismatch`, and those of a folder.
    """
    targets = names_of(folder, "target_parameters", config.where)
    experts: dict[str, FusedExperts] = {}
    for module, layers in _wrapped(fused_modules(folder.names)).items():
        for name, parts in zip(
            _parameters(module, layers, targets, config.where), layers, strict=True
        ):
            a_name, b_name = part(parts, "lora_A", name), part(parts, "lora_B", name)
            rank, shapes = config.rank(name), (folder.shape(a_name), folder.shape(b_name))
            if len(shapes[0]) != 2 or shapes[0][0] % rank or not shapes[0][0]:
                raise rank_mismatch(
                    a_name, shapes[0], f"[experts * {rank}, in] (r in {config.where})"
                )
            if len(shapes[1]) != 2 or shapes[1][1] != shapes[0][0]:
                raise rank_mismatch(b_name, shapes[1], f"[out, {shapes[0][0]}], as A has rows")
            b = folder.take(b_name) * config.scale(name)
            experts[name] = FusedExperts(folder.take(a_name), b, shapes[0][0] // rank)
    return experts


def fused_modules(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Wrapper of fused experts → part → tensor name."""
    return group(names, _FUSED)


def parameter_of(module: str, targets: Iterable[str]) -> str:
    """What PEFT's patterns are matched with for a layer whose LoRA is on a parameter.

    It is the parameter's name (`mlp.gate.weight`, of routers that are no linear layers).
    """
    named = any(_is(f"{module}.weight", target) for target in targets)
    return f"{module}.weight" if named else module


def _wrapped(fused: dict[str, dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Module of experts → its wrappers, the innermost first."""
    found: dict[str, list[dict[str, str]]] = {}
    for name in sorted(fused, key=len, reverse=True):
        found.setdefault(name.removesuffix(".base_layer"), []).append(fused[name])
    return found


def _parameters(
    module: str, layers: list[dict[str, str]], targets: list[str], where: str
) -> list[str]:
    """Names of the parameters that the wrappers of a module adapt."""
    named = [p for p in EXPERTS if any(_is(f"{module}.{p}", target) for target in targets)]
    if len(layers) == len(EXPERTS):
        named = list(EXPERTS)
    if len(named) != len(layers):
        raise AdapterError(
            "unsupported_feature", f"target_parameters in {where} does not say which parameter of"
            f" {module} is adapted", seen=targets, limit=list(EXPERTS),
            fix="save the adapter again with PEFT",
        )  # fmt: skip
    return [f"{module}.{p}" for p in named]


def _is(parameter: str, target: str) -> bool:
    """Whether PEFT finds a parameter under what `target_parameters` says."""
    return parameter == target or parameter.endswith(f".{target}")


def names_of(folder: AdapterFolder, key: str, where: str) -> list[str]:
    """A list of names in the config; AdapterError `bad_value` where it is something else."""
    names = folder.config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise bad_value(f"{key} in {where}", names, "a list of names")
    return names
