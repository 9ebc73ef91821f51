"""Activated LoRA as PEFT saves it: an ordinary LoRA from its invocation tokens on."""

from __future__ import annotations

import dataclasses

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.conditions.column import Column

KEY = "alora_invocation_tokens"
_MOST = 4096
_LARGEST_ID = 1 << 31


def detect(folder: AdapterFolder) -> bool:
    """PEFT asks whether the tokens are null."""
    tokens = folder.config.get(KEY)
    return plain.detect(folder) and tokens is not None and tokens is not False


def read(folder: AdapterFolder) -> RoutedAdapter:
    tokens = _tokens(folder.config[KEY])
    adapter = plain.read(folder, also=(KEY,))
    modules = {
        name: dataclasses.replace(
            pair, gate=make_gate({"source": "position", "blocks": [pair.rank]}, name)
        )
        for name, pair in adapter.modules.items()
    }
    columns = (Column(invocation=tokens),)
    return dataclasses.replace(adapter, modules=modules, system="alora", columns=columns)


def _tokens(value: object) -> tuple[int, ...]:
    fine = isinstance(value, list) and all(type(t) is int and 0 <= t < _LARGEST_ID for t in value)
    if not fine or not 1 <= len(value) <= _MOST:  # type: ignore[arg-type]
        limit = f"1 to {_MOST} token ids"
        raise bad_value(f"{KEY} in adapter_config.json", value, limit)
    return tuple(value)  # type: ignore[arg-type]


READER = Reader(
    name="alora",
    title="Activated LoRA (PEFT)",
    url="https://github.com/huggingface/peft",
    files="adapter_config.json (peft_type LORA, alora_invocation_tokens), a LoRA's tensors",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="Activated LoRA: Fine-tuned LLMs for Intrinsics (arXiv 2504.12397)",
    summary="A LoRA that acts from its invocation tokens on. The tokens before have the base"
    " model's keys and values, and share its prefix cache.",
    request="nothing: the start is found in the prompt's token ids",
    formula="y_t = W x_t + alpha/r B A x_t  from the first token of the last occurrence of\n"
    "alora_invocation_tokens in the prompt on;  y_t = W x_t before, and without an occurrence",
    traps=(
        "The invocation tokens themselves are adapted: the start is the first of them. PEFT's own"
        " documentation has said otherwise, its code has not.",
        "Where the sequence occurs several times, the last occurrence counts.",
        "A prompt without it is answered by the base model, without a word.",
        "It cannot be merged: before its start it is not there.",
    ),
)
