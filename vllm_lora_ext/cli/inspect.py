"""`inspect`: what an adapter is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_lora_ext.cli.output import Json, Set, fail, parse_settings, print_json, table
from vllm_lora_ext.errors import AdapterError

_FACTS = (
    "system", "format", "paper", "base_model", "rank", "router_rows", "classifier",
    "slot_mib", "slot_mib_cpu", "adapter_mib", "digest",
)  # fmt: skip


def inspect(
    folder: Annotated[Path, typer.Argument(help="adapter folder")],
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Read and check an adapter as the server would, and say which flags the server needs.

    Prints its system, experts, ranks and gates and where they stand, the memory of a slot, which
    fields of a request it understands, and what `routing.json` must hold. Exit code 0: it can be
    served, 1: it cannot, and why.

    Examples: `vllm-lora-ext inspect adapters/routed`

    `vllm-lora-ext inspect meteora --set top_k=2 --set temperature=1 --set 'expert_order=["a"]'`
    """
    from vllm_lora_ext.adapters import AdapterFolder, load_adapter
    from vllm_lora_ext.adapters.registry import find_reader
    from vllm_lora_ext.summary import summarise, system_row

    given = parse_settings(settings)
    reader = None
    try:
        reader = find_reader(AdapterFolder(folder, settings=given))
        summary = summarise(load_adapter(folder, settings=given, parts=True), reader)
    except AdapterError as error:
        known = {"system": system_row(reader)} if reader else {}
        if reader and not as_json:
            Console().print(_facts({"system": reader.title, "paper": reader.paper}))
        fail(error, as_json, **known)
    if as_json:
        print_json(summary)
        return
    out = Console()
    out.print(_facts({name: summary[name] for name in _FACTS}))
    if summary["modules"]:
        out.print(_modules(summary["modules"]))
    if summary["blocks"]:
        out.print(_blocks(summary["blocks"]))
    if summary["parts"]:
        out.print(_parts(summary["parts"]))
    for name, meaning in summary["fields"].items():
        out.print(f"lora_ext of a request: [bold]{name}[/] {escape(meaning)}", highlight=False)
    for name, meaning in summary["settings"].items():
        out.print(f"routing.json: [bold]{name}[/] {escape(meaning)}", highlight=False)
    out.print("serve it with:\n  " + escape(summary["serve"]), highlight=False, soft_wrap=True)
    if given:
        out.print(
            "and with these settings in routing.json, or after `vllm-lora-ext convert`: "
            + escape(", ".join(given)), highlight=False, soft_wrap=True,
        )  # fmt: skip


def _facts(facts: dict[str, Any]) -> Table:
    made = table("", "")
    for name, value in facts.items():
        if value != "":
            made.add_row(name, escape(str(value)))
    return made


def _modules(groups: list[dict[str, Any]]) -> Table:
    made = table("modules", "layers", "experts", "ranks", "in → out", "gate")
    for group in groups:
        shape = f"{group['in']} → {group['out']}" + (", one A" if group["shared_a"] else "")
        of = f", router of {group['router_of']}" if group["router_of"] else ""
        of += ", DoRA" if group.get("dora") else ""
        made.add_row(*_cells(group, shape, group["gate"] + of))
    return made


def _blocks(groups: list[dict[str, Any]]) -> Table:
    made = table("MLP blocks", "layers", "experts", "ranks", "experts on", "gate")
    for group in groups:
        made.add_row(*_cells(group, ", ".join(group["parts"]), group["gate"]))
    return made


def _parts(groups: list[dict[str, Any]]) -> Table:
    made = table("in vLLM's own layers", "layers", "what", "rank", "in → out")
    for group in groups:
        cells = (group["name"], group["layers"], group["what"], group["rank"])
        made.add_row(*map(str, cells), f"{group['in']} → {group['out']}")
    return made


def _cells(group: dict[str, Any], *more: str) -> list[str]:
    ranks = ", ".join(map(str, group["ranks"]))
    cells = (group["name"], group["layers"], group["experts"], ranks, *more)
    return [escape(str(cell)) for cell in cells]
