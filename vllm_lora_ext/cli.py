"""The command `vllm-lora-ext`: what is installed, does it fit, what is in an adapter."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_lora_ext.errors import AdapterError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Routed LoRA adapters in stock vLLM: check the installation, look into adapters.",
)
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red", "changed": "red", "missing": "red"}


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say whether this machine serves routed adapters, and if not, what to do.

    Imports no vLLM and starts nothing. Exit code 0: all well, 1: there is a problem.

    Example: `vllm-lora-ext doctor`, or `vllm-lora-ext doctor --json | jq .ok`
    """
    from vllm_lora_ext.doctor import examine

    report = examine()
    if as_json:
        _print_json(report.as_dict())
        raise typer.Exit(0 if report.ok else 1)
    out = Console()
    versions = ", ".join(
        f"{name} {version}" for name, version in report.versions.items() if version
    )
    out.print(versions, highlight=False)
    table = _table("check", "state", "found", "what to do")
    for check in report.checks:
        table.add_row(check.name, _state(check.state), escape(check.seen), escape(check.fix))
    out.print(table)
    out.print(_patch_table([_row(finding) for finding in report.patches]))
    out.print("ready to serve routed adapters" if report.ok else "not ready: see what to do above")
    raise typer.Exit(0 if report.ok else 1)


@app.command("check-vllm")
def check_vllm(
    what: Annotated[
        str,
        typer.Argument(metavar="VERSION_OR_WHEEL_OR_DIR", help="0.33.0, a wheel, or a folder"),
    ],
    as_json: Json = False,
) -> None:
    """Check every patch target in the sources of some vLLM, without installing it.

    A release is fetched with pip as a wheel (some hundred MB for CUDA builds); only its Python
    files are unpacked, and none is run. Exit code 0: every patch fits, 1: some do not.

    Example: `vllm-lora-ext check-vllm 0.33.0`, or
    `vllm-lora-ext check-vllm ~/src/vllm` for a checkout of vLLM's main branch.
    """
    from vllm_lora_ext.model_patches.check import check_tree
    from vllm_lora_ext.sources import sources_of

    with tempfile.TemporaryDirectory(prefix="vllm-lora-ext-") as scratch:
        try:
            root, version = sources_of(what, Path(scratch))
        except AdapterError as error:
            _fail(error, as_json)
        findings = check_tree(root, version)
    wrong = sum(finding.state != "ok" for finding in findings)
    if as_json:
        rows = [_row(finding) for finding in findings]
        _print_json({"ok": not wrong, "version": version, "targets": rows})
    else:
        out = Console()
        out.print(_patch_table([_row(finding) for finding in findings]))
        fits = "every patch fits" if not wrong else f"{wrong} of {len(findings)} targets differ"
        out.print(f"vLLM {version or 'of unknown version'}: {fits}", highlight=False)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="adapter folder")], as_json: Json = False
) -> None:
    """Read and check an adapter as the server would, and say which flags the server needs.

    Example: `vllm-lora-ext inspect adapters/routed`
    """
    from vllm_lora_ext.adapters.registry import load_adapter
    from vllm_lora_ext.summary import summarise

    try:
        summary = summarise(load_adapter(folder))
    except AdapterError as error:
        _fail(error, as_json)
    if as_json:
        _print_json(summary)
        return
    out = Console()
    facts = _table("", "")
    for name in ("system", "base_model", "rank", "router_rows", "slot_mib", "digest"):
        facts.add_row(name, escape(str(summary[name])))
    out.print(facts)
    table = _table("modules", "layers", "experts", "rank", "in → out", "gate")
    for group in summary["modules"]:
        cells = (group["name"], group["layers"], group["experts"], group["rank"])
        shape = f"{group['in']} → {group['out']}"
        table.add_row(*(escape(str(c)) for c in (*cells, shape, group["gate"])))
    out.print(table)
    out.print("serve it with:\n  " + escape(summary["serve"]), highlight=False, soft_wrap=True)


def _row(finding: Any) -> dict[str, Any]:
    return {
        "patch": finding.patch,
        "target": finding.target,
        "state": finding.state,
        "detail": finding.detail,
        "line": finding.line,
    }


def _patch_table(rows: list[dict[str, Any]]) -> Table:
    """One row per patch when all is well; every target that is not gets its own."""
    table = _table("patch", "target in vLLM", "state", "why")
    for patch in dict.fromkeys(row["patch"] for row in rows):
        mine = [row for row in rows if row["patch"] == patch]
        good = [row for row in mine if row["state"] == "ok"]
        if good:
            modules = sorted({row["target"].split(".")[-2] for row in good})
            several = f"{len(good)} targets in {', '.join(modules)}"
            name = good[0]["target"] if len(good) == 1 else several
            table.add_row(patch, escape(name), _state("ok"), escape(good[0]["detail"]))
        for row in mine:
            if row["state"] != "ok":
                where = f"{row['target']}" + (f" (line {row['line']})" if row["line"] else "")
                table.add_row(patch, escape(where), _state(row["state"]), escape(row["detail"]))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def _state(state: str) -> str:
    return f"[{_COLOURS[state]}]{state}[/]"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _fail(error: AdapterError, as_json: bool) -> NoReturn:
    if as_json:
        _print_json({"ok": False, "error": {"code": error.code, "message": error.text}})
    else:
        Console(stderr=True).print(f"[red]{error.code}[/]: {escape(error.text)}", highlight=False)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
