"""Merges written down: a YAML file in, the same adapter every time out, kept once made."""

from vllm_lora_ext.merging.recipes.lock import LOCK, OP_VERSION
from vllm_lora_ext.merging.recipes.parse import parse_recipe, read_recipe
from vllm_lora_ext.merging.recipes.run import run_recipe
from vllm_lora_ext.merging.recipes.schema import Recipe
from vllm_lora_ext.merging.recipes.store import Store
from vllm_lora_ext.merging.recipes.write import Built, write_recipe

__all__ = [
    "LOCK", "OP_VERSION", "Built", "Recipe", "Store", "parse_recipe", "read_recipe", "run_recipe",
    "write_recipe",
]  # fmt: skip
