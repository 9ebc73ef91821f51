"""`python -m vllm_lora_ext.cli`, where the command is not on the path."""

from vllm_lora_ext.cli import app

app()
