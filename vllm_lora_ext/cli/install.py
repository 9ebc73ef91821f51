"""What is installed, and does it fit: `doctor` and `check-vllm`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_lora_ext.cli.output import Json, fail, print_json, state, table
from vllm_lora_ext.errors import AdapterError


def doctor(
    as_json: Json = False,
    as_report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="print Markdown for an issue: these findings, environment variables without"
            " secrets, and what `vllm collect-env` says of the machine",
        ),
    ] = False,
) -> None:
    """Say whether this machine serves routed adapters, and if not, what to do.

    Starts nothing, and imports vLLM for `--report` only. Exit code 0: all well, 1: there is a
    problem.

    Example: `vllm-lora-ext doctor`, or `vllm-lora-ext doctor --json | jq .ok`, or
    `vllm-lora-ext doctor --report > report.md`
    """
    from vllm_lora_ext.doctor import examine, this_machine

    machine = this_machine()
    report = examine(machine)
    if as_report:
        from vllm_lora_ext.report import issue_text

        print(issue_text(report, machine))
        raise typer.Exit(0 if report.ok else 1)
    if as_json:
        print_json(report.as_dict())
        raise typer.Exit(0 if report.ok else 1)
    out = Console()
    versions = ", ".join(
        f"{name} {version}" for name, version in report.versions.items() if version
    )
    out.print(versions, highlight=False)
    rows = table("check", "state", "found", "what to do")
    for check in report.checks:
        rows.add_row(check.name, state(check.state), escape(check.seen), escape(check.fix))
    out.print(rows)
    out.print(_patch_table([_row(finding) for finding in report.patches]))
    out.print("ready to serve routed adapters" if report.ok else "not ready: see what to do above")
    raise typer.Exit(0 if report.ok else 1)


def check_vllm(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="VERSION_OR_WHEEL_OR_DIR",
            help="0.33.0, newest, a wheel, or a folder; without it, the vLLM that is installed",
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="write its sources down as the ones that the patches fit"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every patch target in the sources of some vLLM, without installing it.

    A release is fetched with pip as a wheel (some hundred MB for CUDA builds); only its Python
    files are unpacked, and none is run. Exit code 0: every patch fits, 1: some do not.

    Example: `vllm-lora-ext check-vllm 0.33.0`, or
    `vllm-lora-ext check-vllm ~/src/vllm` for a checkout of vLLM's main branch.

    `--record` is for who has read what changed: this release's hashes in
    `model_patches/targets.json` are written anew, the other releases' stay.
    """
    from vllm_lora_ext.model_patches import check
    from vllm_lora_ext.vllm_sources import sources_of

    with tempfile.TemporaryDirectory(prefix="vllm-lora-ext-") as scratch:
        try:
            root, version = sources_of(what, Path(scratch))
            if record:
                check.record(root, version)
        except AdapterError as error:
            fail(error, as_json)
        findings = check.check_tree(root, version)
    wrong = sum(finding.state != "ok" for finding in findings)
    if as_json:
        rows = [_row(finding) for finding in findings]
        print_json({"ok": not wrong, "version": version, "targets": rows})
    else:
        out = Console()
        out.print(_patch_table([_row(finding) for finding in findings]))
        fits = "every patch fits" if not wrong else f"{wrong} of {len(findings)} targets differ"
        out.print(f"vLLM {version or 'of unknown version'}: {fits}", highlight=False)
    raise typer.Exit(1 if wrong else 0)


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
    made = table("patch", "target in vLLM", "state", "why")
    for patch in dict.fromkeys(row["patch"] for row in rows):
        mine = [row for row in rows if row["patch"] == patch]
        good = [row for row in mine if row["state"] == "ok"]
        if good:
            modules = sorted({row["target"].split(".")[-2] for row in good})
            several = f"{len(good)} targets in {', '.join(modules)}"
            name = good[0]["target"] if len(good) == 1 else several
            made.add_row(patch, escape(name), state("ok"), escape(good[0]["detail"]))
        for row in mine:
            if row["state"] != "ok":
                where = f"{row['target']}" + (f" (line {row['line']})" if row["line"] else "")
                made.add_row(patch, escape(where), state(row["state"]), escape(row["detail"]))
    return made
