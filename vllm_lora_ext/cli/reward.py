"""`reward`: texts by a reward model of several adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.lines import (
    Base,
    EngineArgs,
    Input,
    check_vllm,
    parse_object,
    print_lines,
    read_lines,
)
from vllm_lora_ext.cli.output import Dtype, Set, fail, parse_settings
from vllm_lora_ext.errors import AdapterError


def reward(
    adapter: Annotated[
        Path,
        typer.Argument(help="folder of the reward model: router/, innermoe/<category>/ckpts/"),
    ],
    base: Base,
    input_file: Input,
    settings: Set = None,
    router_device: Annotated[str, typer.Option(help="where the router runs")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="of the engine")] = Dtype.float32,
    engine_args: EngineArgs = "{}",
) -> None:
    """Reward texts with DMoERM: a router, one LoRA expert per capability, a network over them.

    A line of the input is one text. `{"router_ids": [...], "inner_ids": [...]}` are token ids:
    every user turn, each after `<extra_0>`; and the last turn and its reply as `<extra_0>` turn
    `<extra_1>` reply `<extra_2>`. `{"messages": [{"role": "user", "content": "..."}, ...]}` is a
    chat whose last message is the reply; the base model's tokenizer then makes both.

    Prints one line for each: `category`, its name; `category_probs`, of all categories in the
    router's order; `reward`, null where the category has no files. All experts stand on the one
    base model; the router, a model of its own, runs beside the engine.

    Pickles (`.pth`) are converted first, with `convert --allow-pickle`; `lora_alpha`, `points` and
    `categories`, which no file says, stand in `routing.json` or are given by --set.

    Exit code 0: done. 1: the reward model or a text is refused. 2: wrong usage.

    Examples:

    `vllm-lora-ext convert downloads/dmoerm models/reward --allow-pickle --set lora_alpha=32
    --set 'categories=["chat", "text"]' --set 'points={"chat": ["empathy", "logic"]}'`

    `vllm-lora-ext reward models/reward --base models/base --input texts.jsonl > rewards.jsonl`
    """
    given, more = parse_settings(settings), parse_object(engine_args, "--engine-args")
    lines = read_lines(input_file)
    check_vllm("reward")
    from vllm_lora_ext.engines import log_elsewhere

    log_elsewhere()
    from vllm_lora_ext.reward import RewardModel

    try:
        one = base[0] if len(base) == 1 else base
        model = RewardModel(adapter, one, given, router_device, **{"dtype": dtype.value, **more})
        try:
            found = model.score(lines)
        finally:
            model.close()
    except AdapterError as error:
        fail(error, as_json=False)
    if model.note:
        Console(stderr=True).print(f"[yellow]note:[/] {escape(model.note)}", highlight=False)
    print_lines(map(asdict, found))
