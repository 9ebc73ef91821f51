"""`verify`: an adapter's numbers in transformers and in a vLLM engine."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.lines import EngineArgs, parse_object
from vllm_lora_ext.cli.output import (
    Dtype,
    Json,
    Set,
    fail,
    parse_settings,
    print_json,
    steps,
    table,
)
from vllm_lora_ext.errors import AdapterError


def verify(
    adapter: Annotated[Path, typer.Argument(help="adapter folder, of any known format")],
    base: Annotated[str, typer.Option(help="the base model: a folder, or a name on the hub")],
    settings: Set = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="run it in a vLLM engine too (20 s and more)")
    ] = False,
    engine_args: EngineArgs = "{}",
    dtype: Annotated[Dtype, typer.Option(help="of the engine")] = Dtype.float32,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE|random",
            help="a file with one prompt a line, as text or as a JSON list of token ids",
        ),
    ] = "random",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="largest difference of a log-probability that passes; the default goes by dtype:"
            " 0.002 in float32, 0.1 in float16, 0.5 in bfloat16",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run an adapter on its base model in several ways, and print how far they are apart.

    transformers in float32 is the yardstick. The adapter's copy in the native format, where there
    is one (X-LoRA has none), must give the same; with --engine a vLLM engine answers too, rows of
    the adapter and of the base model in one batch, and every log-probability and greedy token is
    compared (of large vocabularies, the 20 likeliest tokens). Of X-LoRA it also prints how far
    frozen gates, an approximation, are from the exact ones.

    Exit code 0: all within the tolerance. 1: beyond it, or the adapter is refused. 2: wrong usage.

    Examples:

    `vllm-lora-ext verify adapters/routed --base models/base`

    `vllm-lora-ext verify adapters/routed --base models/base --engine --dtype bfloat16
    --prompts questions.txt --json`
    """
    given, more = parse_settings(settings), parse_object(engine_args, "--engine-args")
    if importlib.util.find_spec("transformers") is None:
        raise typer.BadParameter(
            "needs transformers: pip install transformers", param_hint="verify"
        )
    if engine and importlib.util.find_spec("vllm") is None:
        raise typer.BadParameter(
            "vLLM is not installed; see docs/install.md", param_hint="--engine"
        )
    try:
        verdict = _verify(adapter, base, given, engine, more, dtype.value, prompts, tolerance)
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print_json(verdict.as_dict())
    else:
        _show(verdict, engine)
    raise typer.Exit(0 if verdict.ok else 1)


def _verify(
    folder: Path, base: str, settings: dict[str, Any], engine: bool, engine_args: dict[str, Any],
    dtype: str, prompts_from: str, tolerance: float | None,
) -> Any:  # fmt: skip
    from vllm_lora_ext import verify as v
    from vllm_lora_ext.adapters import check_fits, load_adapter
    from vllm_lora_ext.adapters.hf import model_shapes
    from vllm_lora_ext.adapters.limits import DTYPES

    loaded = load_adapter(folder, settings=settings)
    copied = loaded.classifier is None  # the native format has none
    if not copied and not engine:
        raise typer.BadParameter(
            f"{loaded.system} has no copy in the native format to be compared with",
            param_hint="--engine",
        )
    texts = None if prompts_from == "random" else _lines(Path(prompts_from))
    with steps(2 + (3 if copied else 4) * len(texts or v.LENGTHS) + 2 * engine) as step:
        step("loading the base model")
        model = v.load_base(base)
        stored = DTYPES[dtype if engine else "float32"]
        check_fits(loaded, model_shapes(model), stored, base_name=base)
        step("choosing prompts")
        prompts = v.random_prompts(model, loaded) if texts is None else _token_ids(texts, base)
        without = v.follow(model, None, prompts, step)
        with_adapter = v.follow(model, loaded, prompts, step)
        comparisons = [v.compare_copy(model, loaded, with_adapter, step)] if copied else []
        distance = v.frozen_distance(model, loaded, prompts, step)
        del model
        if engine:
            with tempfile.TemporaryDirectory(prefix="vllm-lora-ext-") as scratch:
                served = folder if not settings else _served(folder, loaded, settings, scratch)
                longest, vocabulary = max(map(len, prompts)), with_adapter[0].logp_PV.shape[1]
                step("starting the engine")
                options = v.engine_options(base, loaded, dtype, vocabulary, longest) | engine_args
                comparisons += _ask_engine(options, served, with_adapter, without, step)
    return v.Verdict(
        adapter=str(folder), system=loaded.system, base=base, dtype=dtype,
        tolerance=v.TOLERANCES[dtype] if tolerance is None else tolerance, prompts=len(prompts),
        positions=sum(len(s.logp_PV) for s in with_adapter),
        effect=v.effect(with_adapter, without), comparisons=comparisons, distance=distance,
    )  # fmt: skip


def _served(folder: Path, loaded: Any, settings: dict[str, Any], scratch: str) -> Path:
    """What a server, which knows no --set, would serve: the native copy, or where there is none one
    whose sidecar says it."""
    from vllm_lora_ext.adapters import write_native
    from vllm_lora_ext.adapters.folder import SIDECAR

    if loaded.classifier is None:
        return write_native(loaded, scratch)
    copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
    said = json.loads((copy / SIDECAR).read_text()) if (copy / SIDECAR).is_file() else {}
    (copy / SIDECAR).write_text(json.dumps(said | settings))
    return copy


def _ask_engine(
    options: dict[str, Any], served: Path, with_adapter: Any, without: Any, step: Any
) -> list[Any]:
    from vllm_lora_ext.engines import log_elsewhere, start_engine, stop_engine
    from vllm_lora_ext.verify import compare_engine

    log_elsewhere()
    llm = start_engine(options)
    from vllm.lora.request import LoRARequest

    try:
        step("asking the engine")
        lora = LoRARequest("verified", 1, str(served.resolve()))
        return compare_engine(llm, lora, with_adapter, without)
    finally:
        stop_engine(llm)


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="--prompts") from error
    if not lines:
        raise typer.BadParameter(f"{file} holds no prompt", param_hint="--prompts")
    return lines


def _token_ids(lines: list[str], base: str) -> list[list[int]]:
    prompts, tokenizer = [], None
    for line in lines:
        try:
            ids = json.loads(line)
        except ValueError:
            ids = None
        if not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
            from transformers import AutoTokenizer

            try:
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
            except (OSError, ValueError) as error:
                message = f"text needs a tokenizer, and {base} has none; use lists of token ids"
                raise typer.BadParameter(message, param_hint="--prompts") from error
            ids = tokenizer(line)["input_ids"]
        prompts.append(ids)
    return prompts


def _show(verdict: Any, engine: bool) -> None:
    out = Console()
    out.print(
        f"{verdict.system} on {escape(verdict.base)}: {verdict.prompts} prompts,"
        f" {verdict.positions} positions; the adapter moves a log-probability by"
        f" {verdict.effect:.3f} on average",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    made = table("against transformers (float32)", "largest |difference|", "same best token")
    for comparison in verdict.comparisons:
        made.add_row(comparison.what, f"{comparison.largest:.1e}", f"{comparison.greedy:.1%}")
    out.print(made)
    if (far := verdict.distance) is not None:
        out.print(
            f"{far.what}: off by {far.mean:.2g} on average behind the prompt, {far.largest:.2g} at"
            f" most, where the adapter moves a log-probability by {far.effect:.2g};"
            f" {far.greedy:.0%} same best token",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if not verdict.effect:
        out.print("[yellow]the adapter changes nothing, so nothing is shown by this[/]")
    if not engine:
        out.print("no engine was asked: add --engine where vLLM is installed")
    word = "[green]within" if verdict.ok else "[red]beyond"
    out.print(f"{word} the tolerance[/] of {verdict.tolerance:g} ({verdict.dtype})")
