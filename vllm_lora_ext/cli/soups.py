"""`soups`: learn from a few examples how much of each adapter a merge should take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.bundle import named_values
from vllm_lora_ext.cli.output import Dtype, Json, fail, print_json, steps, table
from vllm_lora_ext.errors import AdapterError


def soups(
    base: Annotated[str, typer.Option(help="the base model: a folder, or a name on the hub")],
    adapters: Annotated[
        list[str],
        typer.Option("--adapter", metavar="NAME=DIR", help="an ordinary adapter; repeat it"),
    ],
    examples: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help='JSON Lines: {"prompt": "...", "completion": "..."} in each line'
        ),
    ],
    out: Annotated[Path, typer.Option(help="a new folder for the run")],
    count: Annotated[int, typer.Option("--steps", min=1, help="steps of Adam")] = 50,
    rate: Annotated[float, typer.Option(help="Adam's learning rate")] = 0.1,
    batch: Annotated[int, typer.Option("--batch-size", min=1, help="examples in a step")] = 8,
    seed: Annotated[int, typer.Option(help="of the examples' order")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="prompts are user messages in the model's chat template")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="of the base model")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="where to learn, as torch names it")] = "cpu",
    as_json: Json = False,
) -> None:
    """Learn LoRA Soups' weights: one per adapter and module, a softmax over the adapters.

    The base model and the adapters stay as they are; only the weights move, so that the examples'
    completions become likelier. Plain transformers, no engine. OUT holds `adapter_0`, `adapter_1`,
    ... in the authors' format, the learned scalars beside each adapter's own tensors.

    Exit code 0: learned and written. 1: refused; the message begins with a code of docs/errors.md.
    2: wrong usage.

    Example:

    `vllm-lora-ext soups --base models/base --adapter math=adapters/math
    --adapter code=adapters/code --examples few.jsonl --out soups/math-code`
    """
    named = named_values(adapters, "--adapter")
    if len(named) < 2:
        raise typer.BadParameter("two or more", param_hint="--adapter")
    from vllm_lora_ext.adapters.output import check_place
    from vllm_lora_ext.merging.soups.files import save_soups

    settings = {"steps": count, "rate": rate, "batch": batch, "seed": seed}
    try:
        check_place(out)  # before minutes of learning
        with steps(count + 3) as step:
            soup = _learn(base, named, examples, chat, (dtype.value, device), settings, step)
            step("writing")
            record = _record(base, named, examples, chat, settings, soup)
            folders = save_soups(list(named.values()), soup.scalars, out, record)
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print_json({"ok": True, "out": str(out), "folders": list(map(str, folders))} | record)
    else:
        _report(record, out)


def _learn(
    base: str, named: dict[str, str], examples: Path, chat: bool, where: tuple[str, str],
    settings: dict[str, Any], step: Callable[[str], None],
) -> Any:  # fmt: skip
    from vllm_lora_ext.merging import load_factors
    from vllm_lora_ext.merging.soups.files import read_examples, tokenise
    from vllm_lora_ext.merging.soups.learn import learn_soups

    texts = read_examples(examples)
    step("reading the adapters")
    factors = [load_factors(folder) for folder in named.values()]
    step("loading the base model")
    model, tokenizer = _load(base, *where)
    return learn_soups(
        model, factors, tokenise(tokenizer, texts, chat), **settings,
        progress=lambda done, every, loss: step(f"step {done} of {every}, loss {loss:.3f}"),
    )  # fmt: skip


def _load(base: str, dtype: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise AdapterError(
            "not_found", f"transformers cannot load the base model and its tokenizer: {first}",
            seen=base, fix="name a folder with both, or a model of the hub",
        ) from error  # fmt: skip
    try:
        return model.to(device), tokenizer
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from error


def _record(
    base: str, named: dict[str, str], examples: Path, chat: bool, settings: dict[str, Any],
    soup: Any,
) -> dict[str, Any]:  # fmt: skip
    """What was learned from what; the weights are the softmax of the stored scalars."""
    parts = [
        {"name": name, "folder": folder, "weights": weights}
        for (name, folder), weights in zip(named.items(), soup.weights, strict=True)
    ]
    return {
        "base": base, "adapters": parts, "examples": str(examples), "chat": chat, **settings,
        "loss_before": soup.before, "loss_after": soup.after,
    }  # fmt: skip


def _report(record: dict[str, Any], out: Path) -> None:
    show = Console()
    show.print(
        f"{escape(str(out))}: loss per token {record['loss_before']:.4f} at equal weights,"
        f" {record['loss_after']:.4f} now, after {record['steps']} steps",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    made = table("adapter", "mean weight", "lowest", "highest", "folder")
    for i, part in enumerate(record["adapters"]):
        values = list(part["weights"].values())
        cells = (sum(values) / len(values), min(values), max(values))
        made.add_row(escape(part["name"]), *(f"{v:.3f}" for v in cells), f"adapter_{i}")
    show.print(made)
    show.print(
        "merge them with method soups and, in a recipe,\n  weight: "
        f"{{from: {escape(str(out))}, kind: lora_soups_softmax}}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
