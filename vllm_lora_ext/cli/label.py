"""`label`: candidate labels by how likely the model goes on with them."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_lora_ext.cli.lines import (
    EngineArgs,
    Input,
    check_vllm,
    parse_object,
    print_lines,
    read_lines,
)
from vllm_lora_ext.cli.output import Dtype, fail
from vllm_lora_ext.errors import AdapterError


class By(StrEnum):
    first = "first"
    sum = "sum"
    mean = "mean"


def label(
    base: Annotated[str, typer.Option(help="the base model: a folder, or a name on the hub")],
    input_file: Input,
    adapter: Annotated[
        Path | None, typer.Argument(help="adapter folder, as a server takes it; none: the base")
    ] = None,
    by: Annotated[By, typer.Option(help="which score `label` is chosen by")] = By.first,
    dtype: Annotated[Dtype, typer.Option(help="of the engine")] = Dtype.float32,
    engine_args: EngineArgs = "{}",
) -> None:
    """Score candidate labels of prompts, as classifiers that answer in words are used (Menta).

    A line of the input is one prompt with its labels: `{"prompt": TEXT or [ids], "labels": [TEXT
    or [ids], ...]}`; `messages`, a chat, or `prompt_ids` may stand for `prompt`, and an `id` comes
    back with the answer. Labels may have several tokens and begin alike.

    Prints one line for each: `scores`, three lists of log-probabilities in the order of the
    labels: `first`, of a label's first token alone (what Menta's authors compare); `sum` over its
    tokens; `mean` of them. `best`: the index of the best label by each, of equals the first.
    `label`: the best one by --by. `token_logprobs`: of every token of every label.

    All prompts go to the engine together, and the labels of one share its prefix.

    Exit code 0: done. 1: the adapter or a line is refused. 2: wrong usage.

    Example:

    `vllm-lora-ext label adapters/menta --base models/base --input tasks.jsonl --by first`
    """
    more = parse_object(engine_args, "--engine-args")
    lines = read_lines(input_file)
    check_vllm("label")
    try:
        found = _label(adapter, base, lines, {"dtype": dtype.value, **more}, by.value)
    except AdapterError as error:
        fail(error, as_json=False)
    print_lines(found)


def _label(
    folder: Path | None, base: str, lines: list[Any], more: dict[str, Any], by: str
) -> list[dict[str, Any]]:
    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.engines import log_elsewhere, start_engine, stop_engine
    from vllm_lora_ext.labels import engine_options, read_question, score_labels

    tokenizer = cache(lambda: _tokenizer(base))
    questions = [read_question(line, f"text {i}", tokenizer) for i, line in enumerate(lines, 1)]
    adapter = None if folder is None else load_adapter(folder)
    log_elsewhere()
    llm = start_engine(engine_options(base, adapter) | more)
    try:
        scores = score_labels(llm, questions, None if folder is None else _lora(folder))
    finally:
        stop_engine(llm)
    return [s.as_dict(q, by) for s, q in zip(scores, questions, strict=True)]


def _lora(folder: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("labelling", 1, str(folder.resolve()))


def _tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        message = f"text needs a tokenizer, and {base} has none; use lists of token ids"
        raise typer.BadParameter(message, param_hint="--input") from error
