"""Experts that are ordinary LoRA adapters, each in a subfolder of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, bad_value
from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class ExpertFolder:
    """One adapter of a mixture: its layers with B as it is stored, and its scales."""

    name: str
    config: PeftLora
    modules: dict[str, RoutedModule]

    def scaled_b(self, module: str) -> torch.Tensor:
        """[out, r], B times alpha/r (or alpha/sqrt(r))."""
        return self.modules[module].b_NR * self.config.scale(module)


def expert_names(folder: AdapterFolder, value: Any, key: str) -> list[str]:
    """A list of subfolders out of a setting.

    Raises:
        AdapterError: `bad_value`, or `missing_file` when one of them is not there.
    """
    fine = isinstance(value, list) and all(isinstance(n, str) and n for n in value)
    if not fine or not 1 <= len(value) <= MAX_EXPERTS or len(set(value)) != len(value):
        raise bad_value(key, value, f"1 to {MAX_EXPERTS} different folder names")
    found = folder.subfolders()
    for name in value:
        if name not in found:
            raise AdapterError(
                "missing_file", f"{key} names '{name}', and there is no such folder with an"
                f" {CONFIG}", seen=found[:16] or "no such folders", limit="a folder per name",
                fix="mend the name, or put the adapter there",
            )  # fmt: skip
    return value


def refuse_others(folder: AdapterFolder, named: Collection[str], keys: str) -> None:
    """An adapter beside the experts that nobody names may be an expert that was forgotten.

    Raises:
        AdapterError: `setting_mismatch`.
    """
    others = [name for name in folder.subfolders() if name not in named]
    if others:
        raise AdapterError(
            "setting_mismatch", f"a folder holds an adapter that is not in {keys}",
            seen=others[:16], limit=sorted(named)[:16],
            fix=f"name it in {SIDECAR}, or move it elsewhere",
        )  # fmt: skip


def read_expert(folder: AdapterFolder, name: str, embeddings: bool = False) -> ExpertFolder:
    """The ordinary LoRA in a subfolder.

    Args:
        embeddings: whether it may adapt an embedding.
    Raises:
        AdapterError: as for a plain adapter, with the expert's name; `unsupported_feature`, it
            adapts an embedding and may not.
    """
    try:
        inner = folder.subfolder(name)
        if inner.no_weights is not None:
            raise inner.no_weights
        if not plain.detect(inner):
            raise AdapterError(
                "unsupported_feature", "an expert must be an ordinary LoRA (PEFT)",
                seen=inner.config.get("peft_type"), limit="LORA, lora_A and lora_B only",
                fix="use ordinary LoRA experts",
            )  # fmt: skip
        config, modules = plain.read_pairs(inner, f"{name}/{CONFIG}")
        for module, pair in modules.items():
            if pair.kind != "linear" and not embeddings:
                raise AdapterError(
                    "unsupported_feature", "an expert may adapt linear layers only", seen=module,
                    fix="train it without the embedding",
                )  # fmt: skip
    except AdapterError as error:
        if error.code == "path_not_allowed":
            raise
        text = f"expert '{name}': {error.text}"
        raise AdapterError.parse(f"[lora_ext:{error.code}] {text} [/lora_ext]") or error from error
    return ExpertFolder(name, config, modules)


def same_layers(experts: Sequence[ExpertFolder]) -> list[str]:
    """The layers that all experts adapt, in the first one's order.

    Raises:
        AdapterError: `missing_tensor`, one expert lacks a layer of another; `bad_shape`, they
            differ in a layer's sizes.
    """
    every = {module for expert in experts for module in expert.modules}
    for expert in experts:
        lacking = sorted(every - set(expert.modules))
        if lacking:
            raise AdapterError(
                "missing_tensor", f"expert '{expert.name}' does not adapt {lacking[0]}, others do",
                limit="the same layers in every expert", fix="train all experts on the same layers",
            )  # fmt: skip
    for module in experts[0].modules:
        for expert in experts:
            _check_sizes(module, expert, experts[0])
    return list(experts[0].modules)


def _check_sizes(module: str, expert: ExpertFolder, first: ExpertFolder) -> None:
    seen, wanted = (
        (e.modules[module].a_RK.shape[1], e.modules[module].b_NR.shape[0]) for e in (expert, first)
    )
    if seen != wanted:
        raise AdapterError(
            "bad_shape", f"expert '{expert.name}' was made for another size of {module} than"
            f" '{first.name}'", seen=f"in {seen[0]}, out {seen[1]}",
            limit=f"in {wanted[0]}, out {wanted[1]}", fix="use experts of one base model",
        )  # fmt: skip


def same_base(experts: Sequence[ExpertFolder]) -> str:
    """The one base model that the experts name, or an empty text. Raises `setting_mismatch`."""
    bases = sorted({e.config.base_model for e in experts if e.config.base_model})
    if len(bases) > 1:
        raise AdapterError(
            "setting_mismatch", "the experts' configs name different base models", seen=bases[:4],
            limit="one", fix="mend base_model_name_or_path in the experts' folders",
        )  # fmt: skip
    return bases[0] if bases else ""
