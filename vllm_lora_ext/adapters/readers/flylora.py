"""FlyLoRA (github.com/gfyddha/FlyLoRA): the projection A x chooses the ranks by itself.

    z = A x    y = W x + alpha/r · B ( z on the top-k of z + d, 0 elsewhere )

A is sparse, random and never trained; d balances the ranks and only chooses. The authors publish
two codes: the fork of PEFT that writes these files takes the largest z + d (signed), the short
`flylora.py` the largest |z + d| (abs), as another equation of the paper has it. Both fit the same
tensors and nothing in the files says which one an adapter was trained with, so that `select` has
no default: were it lost from `routing.json`, an `abs` adapter would turn into a `signed` one
without a word. Adapters that were trained with the fork need `signed`.
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
    read_peft_config,
    whole_number,
)

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_topk_bias|lora_[AB]\.weight)")
_MARK = re.compile(r".+\.lora_topk_bias")
# `bias_u` is the step by which training moves the bias.
_KEYS = ("top_k", "bias_u", "init_lora_weights")  # of its own kind: sparse


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "LORA" and (
        any(map(_MARK.fullmatch, folder.names)) or "bias_u" in folder.config
    )


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = read_peft_config(folder.config, also=_KEYS, accepted=folder.accepted)
    # The fork writes all of these; without one, its default would change the numbers.
    needed(folder.config, ("top_k", "use_rslora", "rank_pattern", "alpha_pattern"))
    k = whole_number(folder.config["top_k"], f"top_k in {CONFIG}", 1, MAX_RANK)
    key = folder.setting("select", "which ranks are the top k: 'signed' or 'abs'")
    if key not in ("signed", "abs"):
        raise bad_value("select in routing.json", key, "'signed' or 'abs'")
    modules = {
        name: _read_module(folder, config, k, key, name, parts)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system="flylora", base_model=config.base_model)


def _read_module(
    folder: AdapterFolder, config: PeftLora, k: int, key: str, module: str, parts: dict[str, str]
) -> RoutedModule:
    a_name, b_name = part(parts, "lora_A.weight", module), part(parts, "lora_B.weight", module)
    bias_G = folder.take(part(parts, "lora_topk_bias", module))
    rank = config.rank(module)
    a_RK, b_NR = stack_experts(folder, [a_name], [b_name], rank)
    gate = {
        "source": "self", "blocks": [1] * rank, "bias": "select", "select": "top_k", "key": key,
        "k": k, "weight": "one",
    }  # fmt: skip
    return RoutedModule(
        a_RK=a_RK,
        b_NR=b_NR * config.scale(module),
        gate=make_gate(gate, f"{module} (top_k in {CONFIG})"),
        bias_G=bias_G,
    )


READER = Reader(
    name="flylora",
    title="FlyLoRA",
    url="https://github.com/gfyddha/FlyLoRA",
    files="adapter_config.json (peft_type LORA, top_k), adapter_model.safetensors with "
    "<module>.lora_A.weight, .lora_B.weight, .lora_topk_bias; routing.json with select",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise "
    "Mixture-of-Experts (arXiv 2510.08396)",
    summary="No router: A is a frozen sparse random projection, and the top_k entries of A x plus "
    "a balance bias are the ranks that a token uses, each with weight 1.",
    formula="z = A x;  y = W x + alpha/r B (mask * z),  mask = 1 on the top_k of z + d (of |z + d| "
    "with select abs), 0 elsewhere",
    settings={
        "select": "signed: the top_k of A x + d, as the authors' fork of PEFT has it, which writes "
        "these files; abs: of its magnitude, as their flylora.py and one equation of the paper "
        "have it",
    },
    traps=(
        "signed and abs share only about half of the ranks, and no file says which one an adapter "
        "was trained with. The PEFT fork trains signed.",
        "The authors' code moves lora_topk_bias at every forward pass, in evaluation too: its own "
        "numbers depend on what it was asked before. The stored bias is used as it is.",
        "The scale has the total r in it, not top_k; use_rslora is honoured: alpha / sqrt(r).",
        "A loader that does not know the bias would serve it as an ordinary LoRA of rank r.",
    ),
)
