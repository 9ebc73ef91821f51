"""`systems`: which systems are known."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from vllm_lora_ext.cli.output import Json, fail, print_json, state, table
from vllm_lora_ext.errors import AdapterError


def systems(as_json: Json = False) -> None:
    """List the systems whose adapters are known, and how each becomes one that is served.

    *served*: as it is. *convert*: `vllm-lora-ext convert` makes an ordinary LoRA of it, with the
    options named. *refused*: neither, with the reason.

    Readers that other installed packages bring are in the list. Exit code 0, or 1 when such a
    package is broken.

    Example: `vllm-lora-ext systems`, or `vllm-lora-ext systems --json | jq '.[].name'`
    """
    from vllm_lora_ext.adapters.registry import formats
    from vllm_lora_ext.summary import system_row

    try:
        rows = [system_row(reader) for reader in formats()]
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print_json(rows)
        return
    out, made = Console(), table("name", "system", "status", "convert", "routing.json must say")
    for row in rows:
        needs = " ".join(f"--{need}" for need in row["needs"])
        settings = ", ".join(row["settings"])
        cells = (row["name"], escape(row["title"]), state(row["status"]), needs)
        made.add_row(*cells, escape(settings))
    out.print(made)
    for row in rows:
        if row["reason"]:
            out.print(f"{row['name']} is refused: {escape(row['reason'])}", highlight=False)
