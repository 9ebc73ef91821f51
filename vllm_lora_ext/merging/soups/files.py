"""Files of LoRA Soups: examples to learn from, and runs with learned weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_lora_ext.adapters import AdapterFolder
from vllm_lora_ext.adapters.folder import CONFIG, WEIGHTS
from vllm_lora_ext.adapters.output import fill, new_folder
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.names import PREFIX
from vllm_lora_ext.adapters.registry import find_reader
from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors, peft_files
from vllm_lora_ext.merging.soups.learn import Example

RECORD = "soups.json"


def soup_folders(run: str | os.PathLike[str]) -> list[Path]:
    """`adapter_0`, `adapter_1`, ... of a run, in this order (`adapter_10` after `adapter_9`).

    Raises:
        AdapterError: `missing_file`, one of them is not there.
    """
    found = [path for path in Path(run).glob("adapter_*") if path.is_dir()]
    wanted = [Path(run) / f"adapter_{i}" for i in range(max(len(found), 1))]
    for path in wanted:
        if path not in found:
            raise AdapterError(
                "missing_file", f"the LoRA Soups run has no folder {path.name}",
                seen=sorted(p.name for p in found) or "no adapters",
                limit="adapter_0, adapter_1, ... without a gap", fix="copy the run completely",
            )  # fmt: skip
    return wanted


def read_examples(file: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(prompt, completion) of every line of a JSON Lines file.

    A line is an object with exactly the texts `prompt` and `completion`; empty lines are skipped.

    Raises:
        AdapterError: `not_found`, `bad_file`, `bad_json`, `missing_key`, `unknown_key`,
            `bad_value`.
    """
    path = Path(file)
    if not path.is_file():
        raise AdapterError("not_found", "there is no file of examples", seen=str(path))
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise AdapterError("bad_file", f"the examples cannot be read: {error.strerror}") from error
    found = []
    for i, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_example(parse_object(line, f"line {i} of {path.name}"), i, path.name))
    return found


def tokenise(tokenizer: Any, examples: Sequence[tuple[str, str]], chat: bool) -> list[Example]:
    """Token ids of prompts and completions; every completion ends with the end of text.

    Args:
        tokenizer: of transformers.
        chat: each prompt is a user's message in the model's chat template, else bare text.
    Raises:
        AdapterError: `missing_setting`, the tokenizer has no chat template.
    """
    if chat and not tokenizer.chat_template:
        raise AdapterError(
            "missing_setting", "the base model's tokenizer has no chat template",
            fix="learn without --chat, or add a chat_template to the tokenizer",
        )  # fmt: skip
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for prompt, completion in examples:
        if chat:
            message = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        else:
            ids, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
            # A server tokenises the prompt alone: only what follows it may be learned.
            after = whole[len(ids) :]
            if whole[: len(ids)] != ids:
                after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        found.append(Example(list(ids), [*after, *end]))
    return found


def save_soups(
    folders: Sequence[str | os.PathLike[str]],
    scalars: Sequence[Mapping[str, float]],
    out: str | os.PathLike[str],
    record: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a run as the authors do: `adapter_<i>` with `<module>.lora_learnable_weights` [1].

    The adapters' own tensors stay as they are; one that is no ordinary LoRA file is written as one.
    `out` appears whole or not at all.

    Args:
        folders: of the adapters, in the order they were learned in.
        scalars: `Soup.scalars`, per adapter module → scalar.
        out: must be missing or empty.
        record: goes into `soups.json` beside the adapters, for people.
    Returns:
        The folders written, for `load_soups`.
    Raises:
        AdapterError: `output_exists`, `output_failed`, and what reading raises.
    """
    where = Path(out)
    with new_folder(where) as run:
        for i, (folder, table) in enumerate(zip(folders, scalars, strict=True)):
            _write_adapter(Path(folder), table, run / f"adapter_{i}")
        if record is not None:
            (run / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return [where / f"adapter_{i}" for i in range(len(folders))]


def _example(fields: Mapping[str, Any], line: int, name: str) -> tuple[str, str]:
    where = f"line {line} of {name}"
    for key in sorted(set(fields) - {"prompt", "completion"}):
        raise AdapterError(
            "unknown_key", f"{where} holds '{key}'", seen=fields[key],
            limit=["prompt", "completion"], fix=f"remove '{key}'",
        )  # fmt: skip
    for key in ("prompt", "completion"):
        if key not in fields:
            raise AdapterError("missing_key", f"{where} has no '{key}'", fix=f"add '{key}'")
        if not isinstance(fields[key], str) or not fields[key]:
            raise AdapterError(
                "bad_value", f"'{key}' in {where} is no text", seen=fields[key],
                limit="a text that is not empty", fix="mend the line",
            )  # fmt: skip
    return fields["prompt"], fields["completion"]


def _write_adapter(source: Path, scalars: Mapping[str, float], target: Path) -> None:
    if find_reader(AdapterFolder(source)) is plain.READER:
        config = (source / CONFIG).read_bytes()
        tensors = load_file(next(source / name for name in WEIGHTS if (source / name).is_file()))
    else:
        config, tensors = peft_files(load_factors(source))
    for module, value in scalars.items():
        tensors[f"{PREFIX}{module}.lora_learnable_weights"] = torch.tensor([value])
    target.mkdir()
    fill(target, tensors, {CONFIG: config})
