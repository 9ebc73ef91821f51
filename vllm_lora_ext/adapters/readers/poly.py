"""Poly and MHR (PEFT): A and B of a task are weighted sums of the skills' A and B.

    y = W x + 1/r · x A B,   A = sum_s w_s A_s,   B = sum_s w_s B_s
    w = sigmoid(logits[task]) / sum sigmoid(logits[task])

For one task that is an ordinary LoRA. With n_splits > 1 (multi-head routing) every slice of the
input has its own w for A, and every slice of the output its own w for B: still one A and one B.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader, of_type
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import whole_number
from vllm_lora_ext.adapters.readers.tuners import bad_shape, read_tuner_config, whole
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>poly_lora_A|poly_lora_B|poly_router\.module_logits)")
_ROUTER = "poly_router.module_logits"
_KEYS = ("r", "n_tasks", "n_skills", "n_splits", "poly_type")
_TASK_ID = "number of the task whose weights are served"
_EPS = 1e-12  # PEFT's, under the sum of the weights


def read(folder: AdapterFolder) -> RoutedAdapter:
    base_model = read_tuner_config(folder, _KEYS)
    kind = folder.config.get("poly_type")
    if kind != "poly":
        raise AdapterError(
            "unsupported_feature", "poly_type in adapter_config.json is not known", seen=kind,
            limit="poly", fix="mend poly_type",
        )  # fmt: skip
    rank, tasks, skills, splits = (whole(folder.config, key) for key in _KEYS[:4])
    task = whole_number(folder.setting("task_id", _TASK_ID), f"task_id in {SIDECAR}", 0, tasks - 1)
    modules = {}
    for name, parts in group(folder.names, _PART).items():
        w_QS = _task_weights(folder, part(parts, _ROUTER, name), task, (tasks, splits, skills))
        modules[name] = _read_module(folder, name, parts, w_QS, rank)
    return RoutedAdapter(modules, system="poly", base_model=base_model)


def _task_weights(
    folder: AdapterFolder, name: str, task: int, sizes: tuple[int, int, int]
) -> torch.Tensor:
    """[splits, skills], each row summing to one."""
    tasks, splits, skills = sizes
    if folder.shape(name) != (tasks, splits * skills):
        raise bad_shape(name, folder.shape(name), f"[{tasks}, {splits * skills}]")
    w_QS = torch.sigmoid(folder.take(name)[task]).view(splits, skills)
    return w_QS / (w_QS.sum(dim=-1, keepdim=True) + _EPS)


def _read_module(
    folder: AdapterFolder, module: str, parts: dict[str, str], w_QS: torch.Tensor, rank: int
) -> RoutedModule:
    splits, skills = w_QS.shape
    a_name, b_name = part(parts, "poly_lora_A", module), part(parts, "poly_lora_B", module)
    a_shape, b_shape = folder.shape(a_name), folder.shape(b_name)
    if len(a_shape) != 4 or (*a_shape[:2], a_shape[3]) != (splits, skills, rank):
        raise bad_shape(a_name, a_shape, f"[{splits}, {skills}, in / {splits}, {rank}]")
    if len(b_shape) != 4 or b_shape[:3] != (splits, skills, rank):
        raise bad_shape(b_name, b_shape, f"[{splits}, {skills}, {rank}, out / {splits}]")
    # Q: slices of the input for A, of the output for B; D: the size of one slice.
    a_QDR = torch.einsum("qs,qsdr->qdr", w_QS, folder.take(a_name))
    b_QRD = torch.einsum("qs,qsrd->qrd", w_QS, folder.take(b_name))
    return RoutedModule(
        a_RK=a_QDR.reshape(-1, rank).T.contiguous(),
        b_NR=b_QRD.transpose(1, 2).reshape(-1, rank) / rank,
    )


READER = Reader(
    name="poly",
    title="Poly and MHR (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type POLY, r, n_tasks, n_skills, n_splits), "
    "adapter_model.safetensors with <module>.poly_lora_A, .poly_lora_B and "
    ".poly_router.module_logits, routing.json with task_id",
    peft_types=("POLY",),
    detect=of_type("POLY"),
    read=read,
    paper="Polytropon, https://arxiv.org/abs/2202.13914; multi-head routing,"
    " https://arxiv.org/abs/2211.03831",
    summary="Every task mixes A and B of a common set of skills, each by itself, with weights per"
    " task and module. For one task the mixture is an ordinary LoRA: serve the folder once per"
    " task.",
    formula="y = W x + 1/r · B A x, A = sum_s w_s A_s, B = sum_s w_s B_s,"
    " w = sigmoid(logits[task]) / sum sigmoid(logits[task])",
    settings={"task_id": _TASK_ID},
    traps=(
        "A and B are averaged separately: the result is not the weighted sum of the products.",
        "The scale is 1/r; there is no alpha.",
        "A is stored as [splits, skills, in / splits, r], transposed to an ordinary LoRA's.",
    ),
)
