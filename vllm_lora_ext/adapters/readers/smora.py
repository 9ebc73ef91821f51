"""SMoRA (github.com/StyxXuan/smora): every rank of one LoRA is an expert.

    q = sigmoid(R x), each entry repeated rank_partition times, + b
    y = W x + alpha · B ( ĝ ⊙ (A x) )    ĝ = q / sum over the top-k of q, 0 for the other ranks

The authors write it as alpha/k · B (k ĝ ⊙ A x), with k = `activate_r`.
"""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import needed, stack_experts
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import (
    MAX_RANK,
    PeftLora,
    bad_value,
    flag,
    read_peft_config,
    whole_number,
)
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_biases|lora_(A|B|router)\.weight)")
_MARK = re.compile(r".+\.(lora_biases|lora_router\.weight)")
# The last two choose a way of training and a kernel, not a function.
_KEYS = ("activate_r", "rank_partition", "epsilon_greedy", "dense_compute")


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "SRMOLE" and any(map(_MARK.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = read_peft_config(folder.config, also=_KEYS, accepted=folder.accepted)
    needed(folder.config, ("activate_r", "rank_partition"))
    if config.ranks or config.alphas:
        raise AdapterError(
            "unsupported_feature",
            f"SMoRA knows no rank_pattern or alpha_pattern, and {CONFIG} sets one",
            limit="empty", fix="remove it",
        )  # fmt: skip
    for key in ("epsilon_greedy", "dense_compute"):
        flag(folder.config.get(key), f"{key} in {CONFIG}")
    k = whole_number(folder.config["activate_r"], f"activate_r in {CONFIG}", 1, MAX_RANK)
    repeats = whole_number(
        folder.config["rank_partition"], f"rank_partition in {CONFIG}", 1, config.r
    )
    if config.r % repeats:
        raise bad_value(f"rank_partition in {CONFIG}", repeats, f"a divisor of r = {config.r}")
    modules = {
        name: _read_module(folder, config, k, repeats, name, parts)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system="smora", base_model=config.base_model)


def _read_module(
    folder: AdapterFolder, config: PeftLora, k: int, repeats: int, module: str,
    parts: dict[str, str],
) -> RoutedModule:  # fmt: skip
    a_name, b_name = part(parts, "lora_A.weight", module), part(parts, "lora_B.weight", module)
    router = part(parts, "lora_router.weight", module)
    bias_G = folder.take(part(parts, "lora_biases", module))
    a_RK, b_NR = stack_experts(folder, [a_name], [b_name], config.r)
    rows = config.r // repeats
    if len(folder.shape(router)) != 2 or folder.shape(router)[0] != rows:
        raise AdapterError(
            "bad_shape", f"the router of {module} has the wrong shape",
            seen=list(folder.shape(router)), limit=f"[{rows}, in]: r / rank_partition",
            fix="save the adapter again",
        )  # fmt: skip
    gate = {
        "source": "router", "blocks": [1] * config.r, "score": "sigmoid", "bias": "value",
        "select": "top_k", "k": k, "weight": "renormalise", "constant": k,
    }  # fmt: skip
    return RoutedModule(
        a_RK=a_RK,
        b_NR=b_NR * (config.alpha / k),
        gate=make_gate(gate, f"{module} (activate_r in {CONFIG})"),
        # The ranks of a group share their router row; their biases, and so the choice, may differ.
        router_GK=folder.take(router).repeat_interleave(repeats, dim=0),
        bias_G=bias_G,
    )


READER = Reader(
    name="smora",
    title="SMoRA",
    url="https://github.com/StyxXuan/smora",
    files="adapter_config.json (peft_type SRMOLE, activate_r, rank_partition), "
    "adapter_model.safetensors with <module>.lora_A.weight, .lora_B.weight, .lora_router.weight, "
    ".lora_biases",
    peft_types=("SRMOLE",),
    detect=detect,
    read=read,
    paper="Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task "
    "Learning (arXiv 2501.15103)",
    summary="Every rank is an expert: a router per linear scores the ranks (or groups of "
    "rank_partition ranks) with a sigmoid, a stored bias balances them, and the activate_r best "
    "ranks of a token are used, weighted by their share of the score.",
    formula="q = sigmoid(R x) + b;  y = W x + alpha B (g * A x),  "
    "g = q / sum(q over the top activate_r) for those ranks, 0 for the others",
    traps=(
        "The balance bias b enters the choice and the weight, unlike in most routers.",
        "The scale is alpha / activate_r times gates that sum to activate_r: alpha in the end, "
        "with no r in it. use_rslora has no effect in the authors' code, nor here.",
        "With rank_partition above 1 ranks of a group that have equal biases are tied: an "
        "activate_r that is no multiple of it cuts a group, and we keep its first ranks.",
    ),
)
