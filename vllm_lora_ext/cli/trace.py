"""`trace`: which experts ran, token by token."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.output import Json, Set, fail, parse_settings, steps, table
from vllm_lora_ext.errors import AdapterError

_MOST_EXPERTS = 16


def trace(
    adapter: Annotated[
        Path | None, typer.Argument(help="adapter folder, of any known format; not with --url")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="the prompt: text, or a JSON list of token ids", show_default=False)
    ] = "",
    base: Annotated[str, typer.Option(help="the base model: a folder, or a name on the hub")] = "",
    url: Annotated[
        str, typer.Option(help="ask this running server instead, as http://localhost:8000")
    ] = "",
    model: Annotated[str, typer.Option(help="with --url: the adapter's name there")] = "",
    new_tokens: Annotated[
        int, typer.Option(min=1, help="greedy tokens after the prompt; all but the last are traced")
    ] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="the prompt is a user's message of a chat")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the trace as JSON")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw it: a .png, .svg or .pdf")
    ] = None,
    module: Annotated[
        str, typer.Option(help="draw and list only modules whose name contains this")
    ] = "",
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Show which experts of a routed adapter ran: per token, layer and module, and how strongly.

    Without a server the adapter runs on its base model in transformers, in float32. With --url a
    server that was started with the setting `trace` answers one request, and tells what its
    gates decided; an API key is read from OPENAI_API_KEY, and --base then only names the tokenizer
    that turns token ids into text.

    Prints how often every expert was chosen, and the entropy of its weights in bits (0: one expert
    does all the work). --json prints the whole trace instead. Exit code 0: done. 1: the adapter or
    the request is refused. 2: wrong usage.

    Examples:

    `vllm-lora-ext trace adapters/routed --base models/base --prompt "12 + 30 =" --picture t.png`

    `vllm-lora-ext trace --url http://localhost:8000 --model routed --prompt "12 + 30 ="
    --new-tokens 20 --out trace.json`
    """
    given = parse_settings(settings)
    _check_usage(adapter, base, url, model, prompt)
    try:
        with steps(3) as step:
            if url:
                found = _ask(url, model, prompt, new_tokens, chat, base, step)
            else:
                assert adapter is not None
                found = _record(adapter, given, base, prompt, new_tokens, chat, step)
            step("writing")
            if out is not None:
                _write(out, found.to_json() + "\n")
            if picture is not None:
                from vllm_lora_ext.trace import picture as draw

                draw(found, picture, module)
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print(found.to_json())
    else:
        _show(found, module)


def _check_usage(adapter: Path | None, base: str, url: str, model: str, prompt: str) -> None:
    if not prompt:
        raise typer.BadParameter("name the prompt to trace", param_hint="--prompt")
    if url:
        if adapter is not None:
            raise typer.BadParameter("not with --url: name it with --model", param_hint="ADAPTER")
        if not model:
            raise typer.BadParameter("the adapter's name on the server", param_hint="--model")
        return
    if adapter is None:
        raise typer.BadParameter("an adapter folder, or --url and --model", param_hint="ADAPTER")
    if not base:
        raise typer.BadParameter("the base model of the adapter", param_hint="--base")
    if model:
        raise typer.BadParameter("only with --url", param_hint="--model")
    if importlib.util.find_spec("transformers") is None:
        raise typer.BadParameter("needs transformers: pip install transformers", param_hint="trace")


def _record(
    folder: Path, given: dict[str, Any], base: str, prompt: str, new_tokens: int, chat: bool,
    step: Any,
) -> Any:  # fmt: skip
    from vllm_lora_ext.adapters import check_fits, load_adapter
    from vllm_lora_ext.adapters.hf import model_shapes
    from vllm_lora_ext.adapters.limits import DTYPES
    from vllm_lora_ext.trace import record
    from vllm_lora_ext.verify import load_base

    loaded = load_adapter(folder, settings=given)
    ids = None if chat else _token_ids(prompt)
    step("loading the base model")
    hf_model = load_base(base)
    check_fits(loaded, model_shapes(hf_model), DTYPES["float32"], base_name=base)
    tokenizer = _tokenizer(base, needed=ids is None)
    if ids is None and chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif ids is None:
        ids = tokenizer(prompt)["input_ids"]
    step("running the adapter")
    return _named(record(hf_model, loaded, ids, new_tokens, str(folder)), tokenizer)


def _ask(
    url: str, model: str, prompt: str, new_tokens: int, chat: bool, base: str, step: Any
) -> Any:
    from vllm_lora_ext.trace.client import ask_server

    ids = None if chat else _token_ids(prompt)
    step("asking the server")
    key = os.environ.get("OPENAI_API_KEY")
    found = ask_server(url, model, prompt if ids is None else ids, new_tokens, chat, key)
    return _named(found, _tokenizer(base, needed=False) if base else None)


def _token_ids(prompt: str) -> list[int] | None:
    try:
        ids = json.loads(prompt)
    except ValueError:
        return None
    right = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
    return ids if right else None


def _tokenizer(base: str, needed: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        if not needed:
            return None
        message = f"text needs a tokenizer, and {base} has none; use a list of token ids"
        raise typer.BadParameter(message, param_hint="--prompt") from error


def _named(found: Any, tokenizer: Any) -> Any:
    if tokenizer is None or any(token < 0 for token in found.token_ids):
        return found
    return found.with_tokens([tokenizer.decode([token]) for token in found.token_ids])


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdapterError(
            "output_failed", f"the trace cannot be written: {error.strerror}", seen=str(file),
            fix="name a file in a folder that is there",
        ) from error  # fmt: skip


def _show(found: Any, module: str) -> None:
    out = Console()
    usages = {name: u for name, u in found.usage().items() if module in name}
    count = len(found.token_ids)
    out.print(
        f"{escape(found.system)} {escape(found.adapter)}: {count} tokens,"
        f" {found.prompt_tokens} of them the prompt's; {len(usages)} routed modules",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not usages:
        out.print("[yellow]no routed module: a plain LoRA, or no module of that name[/]")
        return
    made = table("module", "entropy", "expert: share of the tokens that chose it, mean weight")
    for name, usage in usages.items():
        made.add_row(name, f"{usage.entropy:.2f}", _experts(usage))
    out.print(made)


def _experts(usage: Any) -> str:
    """All experts, or the strongest of many."""
    order = sorted(range(len(usage.share)), key=lambda e: -abs(usage.mean_weight[e]))
    shown = sorted(order[:_MOST_EXPERTS])
    text = ", ".join(f"{e}: {usage.share[e]:.0%} {usage.mean_weight[e]:.3g}" for e in shown)
    more = len(order) - len(shown)
    return f"{text}, and {more} more" if more else text
