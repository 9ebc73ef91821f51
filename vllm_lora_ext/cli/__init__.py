"""The command `vllm-lora-ext`: one file per group of commands, put together here.

A command's file imports at its top only what `--help` needs; the rest waits until it runs.
"""

from __future__ import annotations

import typer

from vllm_lora_ext.cli import convert, inspect, install, systems, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Routed LoRA adapters in stock vLLM: check the installation, look into adapters, convert"
    " and verify them.",
)
app.command("doctor")(install.doctor)
app.command("check-vllm")(install.check_vllm)
app.command("systems")(systems.systems)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
