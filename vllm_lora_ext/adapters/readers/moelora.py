"""MOELoRA (github.com/liuqidong07/MOELoRA-peft): experts weighted by the task, not by the token.

    y = W x + alpha/r · sum_e g_e B_e A_e x,   g = softmax(G emb[task])

For one task g is constant, so folding it into B gives an ordinary LoRA of rank r: one adapter per
task id. r is the rank of all experts together.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder, missing_tensor
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part, rank_mismatch
from vllm_lora_ext.adapters.readers.peft_config import (
    MAX_RANK,
    PeftLora,
    read_peft_config,
    whole_number,
)
from vllm_lora_ext.errors import AdapterError

GLOBAL, PER_MODULE = "MMOELORAS", "MMOELORA"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(A\.loraA|B\.loraB)\.(0|[1-9]\d*)(\.mlp)?"
    r"|lora_gate\.GateL|lora_task_embedding)\.weight"
)
_GATE, _EMBEDDING = "lora_gate.GateL", "lora_task_embedding"
_KEYS = ("expert_num", "task_num", "task_embedding_dim")
_TASK_ID = "number of the task whose weights are served"
_MAX_TASKS = 1 << 20


def detect(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") in (GLOBAL, PER_MODULE)


def read(folder: AdapterFolder) -> RoutedAdapter:
    config = read_peft_config(folder.config, also=_KEYS, accepted=folder.accepted)
    if config.rslora or config.ranks or config.alphas:
        raise AdapterError(
            "unsupported_feature",
            "MOELoRA knows no use_rslora, rank_pattern or alpha_pattern (adapter_config.json)",
            fix="remove them",
        )  # fmt: skip
    experts, tasks, width = (_whole(folder, key) for key in _KEYS)
    if config.r % experts:
        raise AdapterError(
            "rank_mismatch", "r in adapter_config.json is shared by expert_num experts",
            seen=config.r, limit=f"a multiple of {experts}", fix="mend r or expert_num",
        )  # fmt: skip
    task = whole_number(folder.setting("task_id", _TASK_ID), f"task_id in {SIDECAR}", 0, tasks)
    shared_E = None
    if folder.config["peft_type"] == GLOBAL:
        names = (f"{_GATE}.weight", f"{_EMBEDDING}.weight")
        shared_E = _task_weights(folder, *names, task, (experts, tasks, width))
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        if shared_E is None:
            names = part(parts, _GATE, name), part(parts, _EMBEDDING, name)
            g_E = _task_weights(folder, *names, task, (experts, tasks, width))
        else:  # the module's own copies were never trained: nothing reads them
            folder.skip(parts[copy] for copy in (_GATE, _EMBEDDING) if copy in parts)
            g_E = shared_E
        modules[name] = _read_module(folder, config, name, parts, g_E)
    return RoutedAdapter(modules, system="moelora", base_model=config.base_model)


def _whole(folder: AdapterFolder, key: str) -> int:
    if key not in folder.config:
        raise AdapterError(
            "missing_key", f"adapter_config.json has no '{key}'",
            fix=f"add {key} to adapter_config.json",
        )  # fmt: skip
    high = MAX_RANK if key == "expert_num" else _MAX_TASKS
    return whole_number(folder.config[key], f"{key} in adapter_config.json", 1, high)


def _task_weights(
    folder: AdapterFolder, gate: str, embedding: str, task: int, sizes: tuple[int, int, int]
) -> torch.Tensor:
    """[E] softmax(G emb[task]). There is one embedding more than there are tasks."""
    experts, tasks, width = sizes
    for name, wanted in ((gate, (experts, width)), (embedding, (tasks + 1, width))):
        if folder.shape(name) != wanted:
            raise AdapterError(
                "bad_shape", f"tensor '{name}' is not of the size the configuration says",
                seen=list(folder.shape(name)), limit=list(wanted),
                fix="mend expert_num, task_num or task_embedding_dim, or save the adapter again",
            )  # fmt: skip
    return torch.softmax(folder.take(gate) @ folder.take(embedding)[task], dim=0)


def _read_module(
    folder: AdapterFolder, config: PeftLora, module: str, parts: dict[str, str], g_E: torch.Tensor
) -> RoutedModule:
    rank = config.r // len(g_E)
    a, b = [], []
    for e in range(len(g_E)):
        a.append(_expert(folder, parts, module, f"lora_A.loraA.{e}"))
        b.append(_expert(folder, parts, module, f"lora_B.loraB.{e}"))
        if a[e].ndim != 2 or a[e].shape != (rank, *a[0].shape[1:]):
            seen = parts[f"lora_A.loraA.{e}.mlp"]
            raise rank_mismatch(seen, tuple(a[e].shape), f"[{rank}, in], r over expert_num")
        if b[e].ndim != 2 or b[e].shape != (*b[0].shape[:1], rank):
            seen = parts[f"lora_B.loraB.{e}.mlp"]
            raise rank_mismatch(seen, tuple(b[e].shape), f"[out, {rank}], r over expert_num")
    weighted = [g * matrix for g, matrix in zip(g_E, b, strict=True)]
    scale = config.alpha / config.r
    return RoutedModule(a_RK=torch.cat(a), b_NR=torch.cat(weighted, dim=1) * scale)


def _expert(folder: AdapterFolder, parts: dict[str, str], module: str, stem: str) -> torch.Tensor:
    """One expert's matrix; the file holds it twice, because its layer registered it twice."""
    if f"{stem}.mlp" not in parts:
        raise missing_tensor(f"{module}.{stem}.mlp.weight")
    matrix = folder.take(parts[f"{stem}.mlp"])
    if stem in parts and not torch.equal(folder.take(parts[stem]), matrix):
        raise AdapterError(
            "duplicate_tensor", "two tensors of the file stand for the same one, and differ",
            seen=[parts[stem], parts[f"{stem}.mlp"]], fix="save the adapter again",
        )  # fmt: skip
    return matrix


READER = Reader(
    name="moelora",
    title="MOELoRA",
    url="https://github.com/liuqidong07/MOELoRA-peft",
    files="adapter_config.json (peft_type MMOELORAS or MMOELORA, expert_num, task_num, "
    "task_embedding_dim), adapter_model.safetensors with <module>.lora_A.loraA.0.mlp.weight, ..., "
    "lora_gate.GateL.weight and lora_task_embedding.weight (once, or per module), routing.json "
    "with task_id",
    peft_types=(GLOBAL, PER_MODULE),
    detect=detect,
    read=read,
    paper="When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical"
    " Applications, https://arxiv.org/abs/2310.18339",
    summary="A gate over the task's embedding weights the experts; it never sees the token. For"
    " one task the weights are constants, and the mixture is an ordinary LoRA: serve the folder"
    " once per task.",
    formula="y = W x + alpha/r · sum_e g_e B_e A_e x, g = softmax(G emb[task])",
    settings={"task_id": _TASK_ID},
    traps=(
        "MMOELORAS has one gate and one embedding for the whole model, at the top level; the"
        " copies in every module are saved too, and nothing reads them.",
        "MMOELORA has a gate and an embedding per module.",
        "r is the rank of all experts together: an expert has r / expert_num.",
        "There are task_num + 1 embeddings, so task ids go from 0 to task_num.",
        "Every expert's matrix stands in the file twice (loraA.0.weight and loraA.0.mlp.weight).",
    ),
)
