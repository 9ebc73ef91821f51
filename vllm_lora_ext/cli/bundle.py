"""`bundle`: ordinary adapters and a router, or several routed adapters, into one routed adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.output import Dtype, Json, fail, parse_settings, print_json, steps
from vllm_lora_ext.errors import AdapterError

_STEPS = 4  # beside one for each folder


def bundle(
    out: Annotated[Path, typer.Option(help="folder for the bundle")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME=DIR",
            help="an expert: an adapter without a router; repeat it, the order is the order of the"
            " router's rows",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="arrow|uniform|request|FILE|DIR",
            help="`arrow`: made of the experts, nothing to train. `uniform`: constant weights."
            " `request`: each request gives the experts' weights by their names."
            " FILE: safetensors with `<module>.router.weight` [experts, in]. DIR: a routed adapter,"
            " whose routers and gate are taken",
        ),
    ] = None,
    routed: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="in place of --adapter: routed adapters with the same gate, whose"
            " experts are put side by side; repeat it",
        ),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="of a logit: identity, softmax, sigmoid, l2, abs")
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="which experts stay: all, top_k, threshold, top_p")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="experts that a token uses")] = None,
    weight: Annotated[
        str | None, typer.Option(help="of a chosen expert: score, renormalise, softmax, one")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="of the softmax over the chosen experts")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate", metavar="FIELD=VALUE",
            help="any other field of the gate table in docs/native_format.md; repeat it",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="arrow only: where PEFT's 15 power iterations start; without it the prototypes are"
            " the exact singular vectors"
        ),
    ] = None,
    shares: Annotated[
        list[str] | None,
        typer.Option(
            "--share", metavar="NAME=NUMBER",
            help="uniform only: the weight of an expert, for each of them; 1/E without it",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="of A and B; routers stay float32")] = Dtype.float32,
    force: Annotated[
        bool, typer.Option("--force", help="put aside what the folder holds, as OUT.old")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Bundle ordinary adapters and a router into one routed adapter, in the native format.

    The experts are adapters of one base model, with ranks and scales of their own. An expert that
    does not adapt a layer of the others adds nothing there. A router that was trained over the
    experts comes as a file or a folder; the gate's fields say what becomes of its logits. With
    --routed, routed adapters become one: one softmax and one choice over the experts of all, which
    is not the sum of the adapters. The folder is put in place whole or not at all.

    Exit code 0: written, read back and equal. 1: refused; the message begins with a code of
    docs/errors.md. 2: wrong usage.

    Examples:

    `vllm-lora-ext bundle --adapter math=adapters/math --adapter code=adapters/code
    --router arrow --k 1 --out adapters/both`

    `vllm-lora-ext bundle --adapter math=adapters/math --adapter code=adapters/code
    --router routers.safetensors --score softmax --select top_k --k 1 --weight renormalise
    --out adapters/both`

    `vllm-lora-ext bundle --routed adapters/one --routed adapters/two --out adapters/all`
    """
    named = named_values(adapters, "--adapter")
    flags = {
        "score": score, "select": select, "k": k, "weight": weight, "temperature": temperature,
    }  # fmt: skip
    fields = _fields(flags, gate)
    numbers = {name: _number(text) for name, text in named_values(shares, "--share").items()}
    if not named and not routed:
        raise typer.BadParameter("name the experts: --adapter NAME=DIR", param_hint="--adapter")
    if routed:
        _only(fields, {"k"}, "--routed")
        for given, option in (
            (named, "--adapter"), (router, "--router"), (numbers, "--share"), (seed, "--seed"),
        ):  # fmt: skip
            if given not in ({}, None):
                raise typer.BadParameter("not together with --routed", param_hint=option)
    elif router is None:
        raise typer.BadParameter("say what chooses among the experts", param_hint="--router")
    try:
        with steps(len(named or routed or ()) + _STEPS) as step:
            if routed:
                made, sources, record = _join(routed, fields.get("k"), step)
            else:
                made, sources, record = _bundle(named, str(router), fields, seed, numbers, step)
            from vllm_lora_ext.bundle import write_bundle

            written = write_bundle(made, out, record, sources, dtype.value, force, step)
    except AdapterError as error:
        fail(error, as_json)
    _report(written, record, as_json)


def _join(routed: list[Path], k: int | None, step: Callable[[str], None]) -> tuple[Any, Any, Any]:
    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.merging.routed import concat_routed

    read = []
    for folder in routed:
        step(f"reading {folder}")
        read.append(load_adapter(folder))
    step("putting the experts side by side")
    made = concat_routed(read, k)
    parts = [{"folder": a.source, "digest": a.digest} for a in read]
    return made, routed, {"system": made.system, "routed": parts, "k": k}


def _bundle(
    named: dict[str, str], router: str, fields: dict[str, Any], seed: int | None,
    shares: dict[str, float], step: Callable[[str], None],
) -> tuple[Any, Any, Any]:  # fmt: skip
    from vllm_lora_ext import bundle as b

    chooser = _router(router, fields, seed, shares, list(named))
    experts = []
    for name, folder in named.items():
        step(f"reading {name}")
        experts.append(b.read_expert(name, folder))
    step("making the prototypes" if router == "arrow" else "putting the experts side by side")
    made = b.bundle(experts, chooser)
    record = {
        "system": made.system,
        "experts": [{"name": e.name, "folder": e.source, "digest": e.digest} for e in experts],
        "router": router, "gate": fields, "seed": seed, "shares": shares,
        "lacking": b.lacking(experts),
    }  # fmt: skip
    files = [] if router in ("arrow", "uniform", "request") else [router]
    return made, [*named.values(), *files], record


def _router(
    kind: str, fields: dict[str, Any], seed: int | None, shares: dict[str, float], names: list[str]
) -> Any:
    from vllm_lora_ext import bundle as b
    from vllm_lora_ext.routing import GateSpec

    if seed is not None and kind != "arrow":
        raise typer.BadParameter("only with --router arrow", param_hint="--seed")
    if shares and kind != "uniform":
        raise typer.BadParameter("only with --router uniform", param_hint="--share")
    if kind == "uniform":
        _only(fields, set(), "--router uniform")
        if shares and set(shares) != set(names):
            wrong = sorted(set(shares) ^ set(names))
            raise typer.BadParameter(
                f"one for each expert, and no other: {', '.join(wrong)}", param_hint="--share"
            )
        return b.Uniform(tuple(shares[name] for name in names) if shares else None)
    if kind == "request":
        _only(fields, set(GateSpec.__dataclass_fields__) - {"source", "blocks"}, "--router request")
        return b.ByRequest(fields)
    if kind == "arrow":
        _only(fields, {"k", "temperature"}, "--router arrow")
        if "k" not in fields:
            raise typer.BadParameter("Arrow needs it: 1 to the number of experts", param_hint="--k")
        return b.Arrow(**fields, seed=seed)
    return b.read_router(kind, fields)


def _fields(flags: dict[str, Any], more: list[str] | None) -> dict[str, Any]:
    found = {name: value for name, value in flags.items() if value is not None}
    for name, value in parse_settings(more).items():
        if name in flags:
            raise typer.BadParameter(f"'{name}' has an option, --{name}", param_hint="--gate")
        found[name] = value
    return found


def _only(fields: dict[str, Any], allowed: set[str], what: str) -> None:
    for name in sorted(set(fields) - allowed):
        raise typer.BadParameter(f"'{name}' means nothing with {what}", param_hint="--gate")


def named_values(pairs: list[str] | None, option: str) -> dict[str, str]:
    """Repeated NAME=VALUE options, in order. Raises typer.BadParameter."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"'{pair}' is not NAME=VALUE", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"'{name}' is there twice", param_hint=option)
        found[name] = value
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is no number", param_hint="--share") from error


def _report(written: Any, record: dict[str, Any], as_json: bool) -> None:
    from vllm_lora_ext.adapters.readers.native import READER
    from vllm_lora_ext.summary import gate_text, summarise

    summary = summarise(written, READER)
    gates = sorted(
        {gate_text(m.gate) for m in [*written.modules.values(), *written.blocks.values()]}
    )
    layers = len(written.modules) + len(written.blocks)
    if as_json:
        kept = ("system", "base_model", "rank", "router_rows", "digest", "flags", "serve")
        facts = {name: summary[name] for name in kept}
        print_json({"ok": True, "out": written.source, "layers": layers, "gates": gates}
                   | record | facts)  # fmt: skip
        return
    show = Console()

    def line(text: str) -> None:
        show.print(text, highlight=False, soft_wrap=True)

    line(f"{escape(written.source)}: {layers} layers, rank {written.rank}; read back and equal")
    for i, part in enumerate(record.get("experts", [])):
        line(f"  expert {i}: [bold]{escape(part['name'])}[/] {escape(part['folder'])}")
    for name, modules in record.get("lacking", {}).items():
        line(
            f"[yellow]note[/]: {escape(name)} does not adapt {len(modules)} of {layers} layers, for"
            f" example {escape(modules[0])}; it adds nothing there"
        )
    line("gate: " + escape("; ".join(gates)))
    line("serve it with:\n  " + escape(summary["serve"]))
