"""DeLoRA (arXiv 2503.18225), as PEFT saves it: normalised ranks times a strength.

    delta = B diag( λ / (r |a_i| |b_i|) ) A diag(w),   w the column norms of the base weight

The norms are stored, so the base weights are not needed.
"""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import read_peft_config
from vllm_lora_ext.adapters.readers.tuners import read_tuner_config, require, take_shaped

_PART = re.compile(r"(?P<module>.+)\.(?P<part>delora_(A|B|lambda|w_norm))")
_KEYS = ("delora_lambda", "lambda_pattern", "r", "rank_pattern")
_SMALLEST_NORM = 1e-4  # PEFT clamps the norms, so that a zero rank stays zero


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    ranks = read_peft_config({
        "r": require(folder.config, "r"), "lora_alpha": 1,
        "rank_pattern": folder.config.get("rank_pattern") or {},
    })  # fmt: skip
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        names = {p: part(parts, f"delora_{p}", name) for p in ("A", "B", "lambda", "w_norm")}
        rank = ranks.rank(name)
        a_RK = take_shaped(folder, names["A"], rank, None)
        b_NR = take_shaped(folder, names["B"], None, rank)
        norm_K = take_shaped(folder, names["w_norm"], a_RK.shape[1])
        sizes = a_RK.norm(dim=1).clamp_min(_SMALLEST_NORM)
        sizes = sizes * b_NR.norm(dim=0).clamp_min(_SMALLEST_NORM)
        strength = take_shaped(folder, names["lambda"], 1) / rank
        modules[name] = RoutedModule(a_RK=a_RK * norm_K, b_NR=b_NR * (strength / sizes))
    return RoutedAdapter(modules, system="delora", base_model=base_model)


READER = Reader(
    name="delora",
    title="DeLoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type DELORA), adapter_model.safetensors with "
    "<module>.delora_A, delora_B, delora_lambda and delora_w_norm",
    peft_types=("DELORA",),
    detect=of_type("DELORA"),
    read=read,
    paper="Decoupling Angles and Strength in Low-rank Adaptation, https://arxiv.org/abs/2503.18225",
    summary="No gate: a LoRA with normalised ranks, one strength, and the base's column norms.",
    formula="y = W x + B diag(λ / (r |a| |b|)) A (w ⊙ x)",
    traps=("The strength is λ/r over the norms; there is no alpha.",),
)
