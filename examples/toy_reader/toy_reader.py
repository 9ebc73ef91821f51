"""ToyMoE: a sigmoid router picks k experts of a linear, and their scores are divided by their sum.

    y = W x + scale · sum_{e in top-k} (p_e / sum of the kept p) U_e D_e x,     p = sigmoid(R x)

An invented system, to show what a reader is. Its files say everything but k.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters import AdapterFolder, Reader, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.toy\.(?P<part>router|(down|up)\.\d+)\.weight")


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == "TOY_MOE"


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = folder.config
    for key in ("rank", "scale"):
        if not isinstance(config.get(key), (int, float)):
            raise AdapterError(
                "bad_value", f"{key} in adapter_config.json must be a number",
                seen=config.get(key), fix=f"add {key}",
            )  # fmt: skip
    k = folder.setting("k", "how many experts a token uses")
    modules = {
        name: _read_module(folder, name, parts, config["rank"], config["scale"], k)
        for name, parts in group(folder.names, _PART).items()
    }
    return RoutedAdapter(modules, system="toy", base_model=config.get("base_model", ""))


def _read_module(
    folder: AdapterFolder, module: str, parts: dict[str, str], rank: int, scale: float, k: object
) -> RoutedModule:
    router_GK = folder.take(part(parts, "router", module))
    experts = range(router_GK.shape[0])
    down = [folder.take(part(parts, f"down.{e}", module)) for e in experts]
    up = [folder.take(part(parts, f"up.{e}", module)) for e in experts]
    for e in experts:
        if down[e].shape[0] != rank or up[e].shape[-1] != rank:
            name = parts[f"down.{e}"]
            raise rank_mismatch(name, tuple(down[e].shape), f"{rank} ranks (adapter_config.json)")
    gate = {
        "source": "router", "blocks": [rank] * len(experts), "score": "sigmoid",
        "select": "top_k", "k": k, "weight": "renormalise",
    }  # fmt: skip
    return RoutedModule(
        a_RK=torch.cat(down),
        b_NR=torch.cat(up, dim=1) * scale,  # every scale is folded into B
        gate=make_gate(gate, f"{module} (k in routing.json)"),
        router_GK=router_GK,
    )


READER = Reader(
    name="toy",
    title="ToyMoE",
    url="https://example.org/toy-moe",
    files="adapter_config.json (peft_type TOY_MOE, rank, scale), adapter_model.safetensors with "
    "<module>.toy.router.weight, <module>.toy.down.0.weight, <module>.toy.up.0.weight, ...",
    peft_types=("TOY_MOE",),
    detect=detect,
    read=read,
    summary="A sigmoid router per linear takes the k best experts and renormalises their scores.",
    formula="y = W x + scale * sum over the k best e of p_e / sum(p of the k) U_e D_e x, "
    "p = sigmoid(R x)",
    settings={"k": "experts that a token uses"},
    traps=("The scale multiplies the sum, not each score.",),
)
