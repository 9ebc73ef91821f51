"""What a request may say about its adapters, and what follows from it for each token."""

from vllm_lora_ext.conditions.column import Column, Prompt, start_of, values
from vllm_lora_ext.conditions.recipe import DERIVED_IDS, PREFIX, Part, Recipe, is_recipe

__all__ = [
    "DERIVED_IDS",
    "PREFIX",
    "Column",
    "Part",
    "Prompt",
    "Recipe",
    "is_recipe",
    "start_of",
    "values",
]
