"""`convert`: any known format into the native one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.output import Dtype, Json, Set, fail, parse_settings, print_json, steps
from vllm_lora_ext.errors import AdapterError


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder of the adapter")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder for the native adapter")],
    settings: Set = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="read .bin, .pt and .pth weights, with torch.load(weights_only=True): tensors"
            " only, everything that could run code is refused",
        ),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="of A and B; routers and biases stay as they are")
    ] = Dtype.float32,
    force: Annotated[
        bool, typer.Option("--force", help="put aside what OUT holds, as OUT.old")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="folder of the base model, for deltas that are made of it")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="of the approximation of a delta with full rank; cuts others"),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="folder of the adapter that training began with (PiSSA)")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="LoRAM's index files: the adapter of a pruned model")
    ] = None,
    pruned: Annotated[
        Path | None, typer.Option(help="folder of the pruned model (LLM-Pruner), with --base")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter of any known format into the native format, and read it back.

    A folder that is complete is served as it is; convert those whose weights are pickles, whose
    settings stand in no file, or which should be smaller. OUT is put in place whole or not at all.

    With one of --base, --rank, --init, --index and --pruned an ordinary LoRA is made of it first:
    `vllm-lora-ext systems` says which formats ask for what. What a rank loses is told, layer by
    layer with --json.

    Exit code 0: written, and equal when read back. 1: the adapter, or OUT, is refused; the message
    begins with a code of docs/errors.md. 2: wrong usage.

    Examples:

    `vllm-lora-ext convert downloads/loramoe adapters/loramoe --allow-pickle`

    `vllm-lora-ext convert meteora adapters/meteora --set top_k=2 --set temperature=1
    --set 'expert_order=["math", "code"]'`

    `vllm-lora-ext convert adapters/routed adapters/routed-bf16 --dtype bfloat16 --json`

    `vllm-lora-ext convert downloads/hira adapters/hira --base models/base --rank 64`
    """
    from vllm_lora_ext.convert import STEPS, Beside
    from vllm_lora_ext.convert import convert as run

    said, beside = parse_settings(settings), Beside(base, rank, init, index, pruned)
    try:
        with steps(STEPS) as step:
            done = run(source, out, said, dtype.value, allow_pickle, force, step, beside)
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print_json({"ok": True, **done.as_dict()})
        return
    rounding = f", rounded by at most {done.rounding:.1e}" if done.rounding else ""
    Console().print(
        f"{escape(done.out)}: {done.system}, {done.layers + done.blocks} layers, {done.tensors}"
        f" tensors in {done.dtype}{rounding}; read back and equal",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if done.errors:
        layer, off = max(done.errors.items(), key=lambda item: item[1])
        Console().print(
            f"an approximation: a layer's delta is off by up to {off:.1%} ({escape(layer)})",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for note in done.notes:
        Console().print(escape(note), highlight=False, soft_wrap=True)
