"""`systems`: which systems are known."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.output import Json, fail, print_json, table
from vllm_lora_ext.errors import AdapterError


def systems(as_json: Json = False) -> None:
    """List the systems whose adapters are known, and whether they are served.

    Readers that other installed packages bring are in the list. Exit code 0, or 1 when such a
    package is broken.

    Example: `vllm-lora-ext systems`, or `vllm-lora-ext systems --json | jq '.[].name'`
    """
    from vllm_lora_ext.adapters.registry import readers
    from vllm_lora_ext.summary import system_row

    try:
        rows = [system_row(reader) for reader in readers()]
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print_json(rows)
        return
    out, made = Console(), table("name", "system", "status", "routing.json must say")
    for row in rows:
        status = "[green]served[/]" if row["status"] == "served" else "[red]refused[/]"
        settings = ", ".join(row["settings"])
        made.add_row(row["name"], escape(row["title"]), status, escape(settings))
    out.print(made)
    for row in rows:
        if row["reason"]:
            out.print(f"{row['name']} is refused: {escape(row['reason'])}", highlight=False)
