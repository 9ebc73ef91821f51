"""Every artefact that is no ordinary LoRA, turned into low-rank factors: one table, one entry."""

from vllm_lora_ext.merging.variants.convert import find_variant, read_variant
from vllm_lora_ext.merging.variants.extract import extract
from vllm_lora_ext.merging.variants.source import Converted
from vllm_lora_ext.merging.variants.table import VARIANTS, Variant

__all__ = ["VARIANTS", "Converted", "Variant", "extract", "find_variant", "read_variant"]
