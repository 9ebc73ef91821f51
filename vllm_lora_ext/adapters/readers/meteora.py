"""MeteoRA (github.com/NJUDeepEngine/meteora): a top-k router over ordinary adapters.

    y = W x + sum_{e in topk(R x)} softmax((R x)_topk / T)_e · s_e B_e A_e x

The files are the state dict of the whole wrapped model, and the PEFT folders of the adapters it
was built from, which know r and alpha. Which k, which temperature and which adapter is expert e
stands nowhere: that has to come in `routing.json`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, bad_value, read_peft_config
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|moe_gate)\.weight")
_GATE = re.compile(r".+\.moe_gate\.weight")
# The wrapped model's own tensors, saved along.
_BASE = re.compile(r"(?!.*(lora_|moe_gate)).+\.(weight|bias|inv_freq)")


def detect(folder: AdapterFolder) -> bool:
    return not folder.has_config and any(map(_GATE.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    tasks = _tasks(folder)
    k = folder.setting("top_k", "how many experts a token uses")
    temperature = folder.setting("temperature", "of the softmax over the chosen experts")
    folder.skip(name for name in folder.names if _BASE.fullmatch(name))
    groups = group(folder.names, _PART)
    stated = _stated_scales(folder, len(tasks))
    modules = {}
    for name, parts in groups.items():
        scales = [task.scale(name) for task in tasks]
        if stated is not None:
            _agree(name, stated, scales)
        modules[name] = _read_module(folder, tasks, scales, name, parts, k, temperature)
    bases = sorted({task.base_model for task in tasks if task.base_model})
    if len(bases) > 1:
        raise AdapterError(
            "setting_mismatch", "the experts' configs name different base models", seen=bases[:4],
            limit="one", fix="mend base_model_name_or_path in the experts' folders",
        )  # fmt: skip
    return RoutedAdapter(modules, system="meteora", base_model=bases[0] if bases else "")


def _tasks(folder: AdapterFolder) -> list[PeftLora]:
    """The experts' own configs, in the order of their rows."""
    order = folder.setting("expert_order", "the experts' folders, in the order of their rows")
    names = isinstance(order, list) and all(isinstance(n, str) and n for n in order)
    if not names or not 1 <= len(order) <= MAX_EXPERTS or len(set(order)) != len(order):
        raise bad_value(
            "expert_order in routing.json", order, f"1 to {MAX_EXPERTS} different folder names"
        )
    files = [f"{name}/adapter_config.json" for name in order]
    configs = [folder.json(file) for file in files]
    for file, config in zip(files, configs, strict=True):
        if config.get("peft_type") != "LORA":
            raise AdapterError(
                "unknown_peft_type", f"an expert of MeteoRA must be an ordinary LoRA: {file}",
                seen=config.get("peft_type"), limit="LORA", fix="use ordinary LoRA experts",
            )  # fmt: skip
    return [
        read_peft_config(config, file, accepted=folder.accepted)
        for file, config in zip(files, configs, strict=True)
    ]


def _stated_scales(folder: AdapterFolder, experts: int) -> list[float] | None:
    """`scaling` of the sidecar; it can be computed, so it is only a promise to check."""
    if not folder.has_setting("scaling"):
        return None
    stated = folder.setting("scaling", "alpha/r of every expert")
    limit = f"{experts} finite numbers, one per expert"
    if not isinstance(stated, list) or len(stated) != experts:
        raise bad_value("scaling in routing.json", stated, limit)
    for value in stated:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
            raise bad_value("scaling in routing.json", stated, limit)
    return [float(value) for value in stated]


def _agree(module: str, stated: list[float], computed: list[float]) -> None:
    for e, (said, found) in enumerate(zip(stated, computed, strict=True)):
        if not math.isclose(said, found, rel_tol=1e-6):
            raise AdapterError(
                "setting_mismatch",
                f"scaling of expert {e} in routing.json is not that of its folder, at {module}",
                seen=said, limit=found, fix="remove 'scaling' from routing.json, or mend it",
            )  # fmt: skip


def _read_module(
    folder: AdapterFolder,
    tasks: list[PeftLora],
    scales: list[float],
    module: str,
    parts: dict[str, str],
    k: Any,
    temperature: Any,
) -> RoutedModule:
    a_name, b_name = part(parts, "lora_A", module), part(parts, "lora_B", module)
    router = part(parts, "moe_gate", module)
    ranks = [task.rank(module) for task in tasks]
    if len(set(ranks)) != 1:
        raise AdapterError(
            "rank_mismatch", f"the experts of {module} differ in rank, MeteoRA stacks equal ones",
            seen=ranks[:32], limit="one rank", fix="mend r in the experts' adapter_config.json",
        )  # fmt: skip
    if len(folder.shape(router)) != 2 or folder.shape(router)[0] != len(tasks):
        raise AdapterError(
            "setting_mismatch",
            f"expert_order in routing.json names {len(tasks)} experts, not those of '{router}'",
            seen=list(folder.shape(router)), limit=f"[{len(tasks)}, in]",
            fix="name every expert once, in the order of training",
        )  # fmt: skip
    total, a_shape, b_shape = sum(ranks), folder.shape(a_name), folder.shape(b_name)
    if len(a_shape) != 2 or a_shape[0] != total:
        raise rank_mismatch(a_name, a_shape, f"[{total}, in]: {len(tasks)} experts of {ranks[0]}")
    if len(b_shape) != 2 or b_shape[1] != total:
        raise rank_mismatch(b_name, b_shape, f"[out, {total}]: {len(tasks)} experts of {ranks[0]}")
    scale_R = torch.tensor(scales).repeat_interleave(torch.tensor(ranks))
    gate = {
        "source": "router", "blocks": ranks, "select": "top_k", "k": k, "weight": "softmax",
        "temperature": temperature,
    }  # fmt: skip
    return RoutedModule(
        a_RK=folder.take(a_name),
        b_NR=folder.take(b_name) * scale_R,
        gate=make_gate(gate, f"{module} (top_k, temperature in routing.json)"),
        router_GK=folder.take(router),
    )


READER = Reader(
    name="meteora",
    title="MeteoRA",
    url="https://github.com/NJUDeepEngine/meteora",
    files="model.safetensors (the wrapped model's state dict with <module>.moe_gate.weight), one "
    "PEFT folder per expert, routing.json with top_k, temperature, expert_order; no "
    "adapter_config.json",
    peft_types=(),
    detect=detect,
    read=read,
    paper="MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models (arXiv 2405.13053)",
    summary="A router per linear over ordinary adapters that were trained before: the top_k logits "
    "go through a softmax with a temperature.",
    formula="l = R x;  y = W x + sum over the top_k e of softmax(l over the top_k / T)_e "
    "s_e B_e A_e x,  s_e = alpha_e / r_e",
    settings={
        "top_k": "experts that a token uses (2 in the authors' code)",
        "temperature": "T of the softmax over the chosen experts (1 in the authors' code; their "
        "README sets 15, 20 and 30 for 3, 5 and 10 tasks in one prompt)",
        "expert_order": "the experts' folders in the order of their rows in lora_A",
        "scaling": "alpha / r of every expert; optional, checked against the experts' configs",
    },
    traps=(
        "The weights file is the state dict of the whole wrapped model; base weights in it are "
        "not read. r and alpha come from the experts' own folders.",
        "expert_order is the order of training: another order swaps the experts' scales.",
        "The slow path of the authors' code ignores the temperature; the default path, and we, "
        "do not.",
        "All experts must have the same rank.",
    ),
)
