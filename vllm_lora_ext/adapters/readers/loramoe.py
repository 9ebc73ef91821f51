"""LoRAMoE (github.com/Ablustrund/LoRAMoE): a dense softmax over all experts of a linear.

    y = W x + alpha/r · sum_e softmax(R x)_e B_e A_e x

Its config says `peft_type: LORA`; numbered tensors (`lora_A0`) and `lora_nums` tell it apart.
"""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import Stack, early_peft_config, expert_count
from vllm_lora_ext.adapters.readers.names import group
from vllm_lora_ext.errors import AdapterError

_NUMBERED_A = re.compile(r".+\.lora_A\d+\.weight")
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(route|[AB](0|[1-9]\d{0,5})))\.weight")
_STACK = Stack("lora_A{}", "lora_B{}", "lora_route")
# `blc_*` weigh a training loss; the other two come from old PEFT.
_KEYS = ("lora_nums", "blc_alpha", "blc_weight", "enable_lora", "merge_weights")


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "LORA" and any(
        map(_NUMBERED_A.fullmatch, folder.names)
    )


def read(folder: AdapterFolder) -> RoutedAdapter:
    return read_dense(folder, "loramoe", "LoRAMoE", _PART, _STACK)


def read_dense(
    folder: AdapterFolder, system: str, title: str, pattern: re.Pattern[str], stack: Stack
) -> RoutedAdapter:
    """LoRAMoE and what grew out of its code: a softmax over all experts.

    Raises:
        AdapterError: what `early_peft_config`, `expert_count` and `Stack.read` raise;
            `unsupported_feature`.
    """
    config = early_peft_config(folder.config, title, _KEYS, folder.accepted)
    for feature in ("enable_lora", "merge_weights"):
        if folder.config.get(feature):
            raise AdapterError(
                "unsupported_feature", f"{CONFIG} sets '{feature}', which is not served",
                seen=folder.config[feature], limit="null or false", fix="save it without",
            )  # fmt: skip
    experts = expert_count(folder.config, "lora_nums")
    gate = {"blocks": [config.r] * experts, "score": "softmax"}
    modules = {
        name: stack.read(folder, name, parts, gate, config.alpha / config.r)
        for name, parts in group(folder.names, pattern).items()
    }
    return RoutedAdapter(modules, system=system, base_model=config.base_model)


READER = Reader(
    name="loramoe",
    title="LoRAMoE",
    url="https://github.com/Ablustrund/LoRAMoE",
    files="adapter_config.json (peft_type LORA, lora_nums), adapter_model.safetensors with "
    "<module>.lora_route.weight, .lora_A0.weight, .lora_B0.weight, ...",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style "
    "Plugin (arXiv 2312.09979)",
    summary="A softmax router per linear weights all LoRA experts, none is left out.",
    formula="y = W x + alpha/r sum_e softmax(R x)_e B_e A_e x",
    traps=(
        "The gate is dense: there is no top-k, every expert answers every token.",
        "The config says peft_type LORA, so that a plain loader may take the folder for its own.",
        "blc_alpha and blc_weight (expert groups for knowledge and tasks) are a training loss and "
        "have no part in serving.",
    ),
)
