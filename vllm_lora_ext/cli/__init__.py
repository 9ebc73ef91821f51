"""The command `vllm-lora-ext`: one file per group of commands, put together here.

A command's file imports at its top only what `--help` needs; the rest waits until it runs.
"""

from __future__ import annotations

import typer

from vllm_lora_ext.cli.bundle import bundle as bundle_command
from vllm_lora_ext.cli.convert import convert as convert_command
from vllm_lora_ext.cli.inspect import inspect as inspect_command
from vllm_lora_ext.cli.install import check_vllm, doctor
from vllm_lora_ext.cli.label import label as label_command
from vllm_lora_ext.cli.merge import merge as merge_command
from vllm_lora_ext.cli.reward import reward as reward_command
from vllm_lora_ext.cli.soups import soups as soups_command
from vllm_lora_ext.cli.systems import systems as systems_command
from vllm_lora_ext.cli.trace import trace as trace_command
from vllm_lora_ext.cli.verify import verify as verify_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Routed LoRA adapters in stock vLLM: check the installation, look into adapters, convert"
    " and verify them.",
)
app.command("doctor")(doctor)
app.command("check-vllm")(check_vllm)
app.command("systems")(systems_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("bundle")(bundle_command)
app.command("merge")(merge_command)
app.command("soups")(soups_command)
app.command("verify")(verify_command)
app.command("trace")(trace_command)
app.command("reward")(reward_command)
app.command("label")(label_command)
