"""MoRAM (github.com/Artificer-AI-Lab/MoRAM, its TRACE part): ranks that activate themselves.

    z = A x    n = z / |z|    w = softmax(n / tau over the top-K of n), then 0 where n < delta
    y = W x + B ( w ⊙ z )

A and B are a bank (`lora_A`, `lora_B`: the ranks of all tasks so far) and below it the fresh ranks
of the next task (`loranew_A`, `loranew_B`). Both compete in the norm, the top-K and the softmax;
alpha/r multiplies the fresh block only. tau and delta are command-line arguments of the authors.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import (
    early_peft_config,
    needed,
    number,
    stack_experts,
)
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import MAX_RANK, flag, whole_number
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>(lora|loranew)_[AB])\.weight")
# `use_mora` is the older name of `use_moram`; `save_loranew` is read by the training only.
_KEYS = ("r_sum", "use_moram", "use_mora", "moram_topk", "save_loranew")
_MIN_TAU, _MAX_TAU = 1e-6, 1e6  # the authors' code clamps below


def detect(folder: AdapterFolder) -> bool:
    named = _asks_for_moram(folder) or bool(folder.config.get("r_sum"))
    return folder.config.get("peft_type") == "LORA" and (named or _has_fresh(folder))


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = early_peft_config(folder.config, "MoRAM", _KEYS, folder.accepted)
    needed(folder.config, ("r_sum",))
    for key in ("use_moram", "use_mora", "save_loranew"):
        flag(folder.config.get(key), f"{key} in {CONFIG}")
    if not _asks_for_moram(folder):
        raise AdapterError(
            "unsupported_feature",
            f"it has MoRAM's r_sum or loranew tensors, and use_moram in {CONFIG} is not true: "
            "without it the authors' code has no gate", seen=folder.config.get("use_moram"),
            limit="true", fix="set use_moram if this is MoRAM's",
        )  # fmt: skip
    fresh = config.r if _has_fresh(folder) else 0
    bank = whole_number(folder.config["r_sum"], f"r_sum in {CONFIG}", 0 if fresh else 1, MAX_RANK)
    gate = _gate(folder, bank + fresh)
    modules = {
        name: _read_module(folder, name, parts, bank, fresh, config.alpha / config.r, gate)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system="moram", base_model=config.base_model)


def _asks_for_moram(folder: AdapterFolder) -> bool:
    return folder.config.get("use_moram") is True or folder.config.get("use_mora") is True


def _has_fresh(folder: AdapterFolder) -> bool:
    return any("loranew_" in name for name in folder.names)


def _gate(folder: AdapterFolder, ranks: int) -> dict[str, object]:
    tau = number(
        folder.setting("tau", "temperature of the softmax over the chosen ranks"),
        "tau in routing.json", _MIN_TAU, _MAX_TAU,
    )  # fmt: skip
    delta = number(
        folder.setting("delta", "smallest normalised projection that counts; 0 for none"),
        "delta in routing.json", 0, 1,
    )  # fmt: skip
    return {
        "source": "self", "blocks": [1] * ranks, "score": "l2", "select": "top_k",
        # The authors' code never takes fewer than 2, and all when there are not that many.
        "k": min(max(_top_k(folder), 2), ranks), "weight": "softmax", "temperature": tau,
        "mask_below": delta if delta > 0 else None,
    }  # fmt: skip


def _top_k(folder: AdapterFolder) -> int:
    """`moram_topk` of the config, or `top_k` of the sidecar; if both are there they must agree."""
    stored = folder.config.get("moram_topk")
    if stored is not None:
        whole_number(stored, f"moram_topk in {CONFIG}", 1, MAX_RANK)
        if not folder.has_setting("top_k"):
            return int(stored)
    given = folder.setting("top_k", "how many ranks a token uses; the authors take r by default")
    whole_number(given, "top_k in routing.json", 1, MAX_RANK)
    if stored not in (None, given):
        raise AdapterError(
            "setting_mismatch", f"top_k in routing.json is not moram_topk of {CONFIG}", seen=given,
            limit=stored, fix="remove one of them",
        )  # fmt: skip
    return int(given)


def _read_module(
    folder: AdapterFolder, module: str, parts: dict[str, str], bank: int, fresh: int,
    scale: float, gate: dict[str, object],
) -> RoutedModule:  # fmt: skip
    a_name, b_name = part(parts, "lora_A", module), part(parts, "lora_B", module)
    a_RK, b_NR = stack_experts(folder, [a_name], [b_name], bank)
    if fresh:
        a_name, b_name = part(parts, "loranew_A", module), part(parts, "loranew_B", module)
        new_a, new_b = stack_experts(folder, [a_name], [b_name], fresh)
        if new_a.shape[1] != a_RK.shape[1] or new_b.shape[0] != b_NR.shape[0]:
            raise AdapterError(
                "bad_shape", f"the bank and the fresh ranks of {module} differ in size",
                seen=f"A {list(new_a.shape)}, B {list(new_b.shape)}",
                limit=f"A [{fresh}, {a_RK.shape[1]}], B [{b_NR.shape[0]}, {fresh}]",
                fix="save the adapter again",
            )  # fmt: skip
        a_RK, b_NR = torch.cat([a_RK, new_a]), torch.cat([b_NR, new_b * scale], dim=1)
    return RoutedModule(
        a_RK=a_RK, b_NR=b_NR, gate=make_gate(gate, f"{module} (tau, delta, top_k in routing.json)")
    )


READER = Reader(
    name="moram",
    title="MoRAM",
    url="https://github.com/Artificer-AI-Lab/MoRAM",
    files="adapter_config.json (peft_type LORA, use_moram, r_sum), adapter_model.safetensors with "
    "<module>.lora_A.weight, .lora_B.weight and mostly .loranew_A.weight, .loranew_B.weight; "
    "routing.json with tau, delta, top_k",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="Little By Little: Continual Learning via Incremental Mixture of Rank-1 Associative "
    "Memory Experts (arXiv 2506.21035; an earlier version called the method MoRA)",
    summary="No router: every rank of a bank that grows with each task is an expert, and the ranks "
    "whose normalised projection of the token is largest are used, weighted by a sharp softmax.",
    formula="z = A x;  n = z / ||z||;  w = softmax(n / tau) over the K largest n, then 0 where "
    "n < delta;  y = W x + B (w * z),  K = max(top_k, 2)",
    settings={
        "tau": "temperature of the softmax (the authors' --moram_router_temp: 0.01 by default, "
        "0.03 in their script)",
        "delta": "smallest normalised projection that still counts, 0 for none (the authors' "
        "--moram_infer_lora_a_thresh: 0 by default, 0.2 in their script)",
        "top_k": "ranks that a token uses; not needed when the config has moram_topk (without "
        "either, the authors take r)",
    },
    traps=(
        "The fresh loranew rows have no effect of their own when B is zero, but they stand in the "
        "norm and in the top-K: without them the other ranks get other weights.",
        "alpha / r multiplies the loranew block only. Saving moves trained ranks into the bank "
        "and so drops the factor: the checkpoint is not the function that was trained, and its "
        "own numbers are served.",
        "delta zeroes weights after the softmax; what is left does not sum to 1.",
        "K is never below 2.",
        "Not MoRA with square matrices (arXiv 2405.12130). The CLIP models of the same repository "
        "(X-TAIL; tensors old_lora_A) are saved as whole models and are not served.",
    ),
)
